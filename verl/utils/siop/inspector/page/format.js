// Numbers as text and as colour.

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size > 0 && size < 0.0005) return value.toExponential(0);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : Math.min(digits, size >= 1 ? 2 : digits));
}

export function signed(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return (value > 0 ? "+" : value < 0 ? "−" : "") + number(Math.abs(value), digits);
}

export function range(low, high, digits) {
  return low === high ? number(low, digits) : `${number(low, digits)} to ${number(high, digits)}`;
}

export function counted(count, what) {
  return `${count.toLocaleString("en-US")} ${what}${count === 1 ? "" : "s"}`;
}

// How strongly a value is coloured, of the largest of its kind: the side by hue, the size by opacity.
export function heat(value, largest) {
  if (value === null || value === undefined || !largest) return { side: "none", share: 0 };
  const share = Math.min(1, Math.abs(value) / largest);
  return { side: value > 0 ? "up" : value < 0 ? "down" : "none", share };
}

// Clusters are named A, B, … in the order of their weight, and coloured alike.
export function clusterName(place) {
  return place < 26 ? String.fromCharCode(65 + place) : `#${place + 1}`;
}

export const CLUSTER_COLOURS = 8;
