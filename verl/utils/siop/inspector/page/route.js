// Where the page is, as its address says it: #/VIEW?name=value&…, so that every state is a link.

export function parse(hash = location.hash) {
  const [path, query] = hash.replace(/^#\/?/, "").split("?");
  const values = {};
  for (const [name, value] of new URLSearchParams(query || "")) values[name] = value;
  return { view: path || "curves", values };
}

export function link(view, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    if (value !== undefined && value !== null && value !== "" && value !== false) query.set(name, value);
  }
  const text = query.toString();
  return `#/${view}${text ? `?${text}` : ""}`;
}

export function go(view, values) {
  location.hash = link(view, values);
}

// Without a new entry in the history, for what changes with every key.
export function put(view, values) {
  history.replaceState(null, "", link(view, values));
}

// Several names as one value, whatever characters they have.
export const listOf = (names) => names.map((name) => name.replace(/[%,]/g, encodeURIComponent)).join(",");
export const namesOf = (list) => list.split(",").map((name) => name.replace(/%(25|2C)/g, decodeURIComponent));

export const RANGES = {
  step: "step",
  clusters: "clusters",
  outcome: "outcome",
  reward: "reward",
  advantage: "advantage",
  turns: "turns",
};
const SEARCH = [
  "text", "flags", "sort", "descending",
  ...Object.keys(RANGES).flatMap((name) => [`${name}_from`, `${name}_to`]),
];

// Where a question is: in which list, and the how manieth of it.
export function questionPlace(values, { step, group }, at) {
  return { run: values.run, step, group, at, ...searchOf(values) };
}

// The part of the address that says what is listed.
export function searchOf(values) {
  return Object.fromEntries(SEARCH.filter((name) => values[name]).map((name) => [name, values[name]]));
}
