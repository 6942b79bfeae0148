// The support of a rollout's cluster at its boundaries, small enough for a column.

import { svg } from "inspector/dom";
import { number } from "inspector/format";

const WIDTH = 220;
const HEIGHT = 54;
const LABELS = 7;
const PAD = { left: 6, right: 6, top: 8, bottom: 13 };

export function supportCurve(support, boundaries) {
  const y = (value) => HEIGHT - PAD.bottom - value * (HEIGHT - PAD.top - PAD.bottom);
  const x = (place) => PAD.left + (place / (support.length - 1 || 1)) * (WIDTH - PAD.left - PAD.right);
  const every = Math.ceil(support.length / LABELS); // so that no label lies on another
  const where = (place) =>
    place === 0 ? "prompt" : boundaries ? `token ${boundaries[place]}` : `boundary ${place}`;
  const label = `Support by boundary: ${support.map((value, place) => `${where(place)} ${number(value)}`).join(", ")}`;
  return svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label, preserveAspectRatio: "none" },
    [0, 1].map((value) => svg("line", { class: "grid", x1: PAD.left, x2: WIDTH - PAD.right, y1: y(value), y2: y(value) })),
    support.map((_, place) => svg("line", { class: "grid", x1: x(place), x2: x(place), y1: y(1), y2: y(0) })),
    svg("path", { class: "line", d: support.map((value, place) =>
      value === null ? "" : `${place && support[place - 1] !== null ? "L" : "M"}${x(place)} ${y(value)}`).join("") }),
    support.map((value, place) => value !== null &&
      svg("circle", { class: "dot", cx: x(place), cy: y(value), r: 2.6 },
        svg("title", {}, `p${place} = ${number(value)} at ${where(place)}`))),
    support.map((value, place) => (place % every === 0 || place === support.length - 1) &&
      svg("text", { x: x(place), y: HEIGHT - 2, "text-anchor": place === 0 ? "start" : place === support.length - 1 ? "end" : "middle" },
        number(value, 2))),
  );
}
