// Line charts as SVG: steps to the right, a line per series, values on hover or with the arrow keys.

import { el, svg } from "inspector/dom";
import { number } from "inspector/format";

const WIDTH = 360;
const HEIGHT = 150;
const PAD = { left: 40, right: 8, top: 8, bottom: 20 };

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((one) => one * power >= rough) * power;
  const found = [];
  for (let at = Math.ceil(low / unit) * unit; at <= high + unit * 1e-9; at += unit) found.push(at);
  return found;
}

function extent(series) {
  const values = series.flatMap((one) => one.values).filter((value) => value !== null);
  let low = Math.min(...values, 0);
  let high = Math.max(...values);
  if (low === high) high = low + 1;
  const room = (high - low) * 0.05;
  return [low < 0 ? low - room : low, high + room];
}

function path(one, x, y) {
  let text = "";
  let pen = "M";
  one.values.forEach((value, index) => {
    if (value === null) {
      pen = "M";
      return;
    }
    text += `${pen}${x(one.steps[index]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  });
  return text;
}

function axes(x, y, steps, values) {
  const found = [];
  for (const value of values) {
    found.push(svg("line", { class: "grid", x1: PAD.left, x2: WIDTH - PAD.right, y1: y(value), y2: y(value) }));
    found.push(svg("text", { class: "tick", x: PAD.left - 5, y: y(value) + 3, "text-anchor": "end" }, String(Number(value.toPrecision(3)))));
  }
  for (const step of steps) {
    found.push(svg("text", { class: "tick", x: x(step), y: HEIGHT - 5, "text-anchor": "middle" }, String(step)));
  }
  return found;
}

// A piece of a series' line, before its name.
export function key(colour, dash = "") {
  return svg("svg", { class: "key", viewBox: "0 0 20 4", "aria-hidden": "true", focusable: "false" },
    svg("line", { class: `line ${colour} ${dash}`, x1: 0, x2: 20, y1: 2, y2: 2 }));
}

// What the series say at a step, as text.
function reading(series, step) {
  return series
    .map((one) => ({ one, value: one.values[one.steps.indexOf(step)] }))
    .filter(({ value }) => value !== undefined && value !== null)
    .map(({ one, value }) => ({ label: one.label, colour: one.colour, dash: one.dash, text: number(value) }));
}

// series: [{label, steps, values, colour (class), dash (class)}]; marks: steps of alarms.
export function chart({ title, series, marks = [], onstep }) {
  const steps = [...new Set(series.flatMap((one) => one.steps))].sort((a, b) => a - b);
  const [first, last] = [steps[0], steps[steps.length - 1]];
  const [low, high] = extent(series);
  const x = (step) => PAD.left + ((step - first) / (last - first || 1)) * (WIDTH - PAD.left - PAD.right);
  const y = (value) => HEIGHT - PAD.bottom - ((value - low) / (high - low)) * (HEIGHT - PAD.top - PAD.bottom);
  const cursor = svg("line", { class: "cursor", y1: PAD.top, y2: HEIGHT - PAD.bottom, visibility: "hidden" });
  const whole = ticks(first, last, 4).filter(Number.isInteger);
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true", focusable: "false" },
    axes(x, y, whole, ticks(low, high, 4)),
    marks.map((step) => svg("line", { class: "mark", x1: x(step), x2: x(step), y1: PAD.top, y2: HEIGHT - PAD.bottom })),
    series.map((one) => svg("path", { class: `line ${one.colour} ${one.dash || ""}`, d: path(one, x, y) })),
    last === first
      ? series.flatMap((one) =>
          one.values.map((v) => v !== null && svg("circle", { class: `dot ${one.colour}`, cx: x(first), cy: y(v), r: 3 })))
      : [],
    cursor,
  );
  const legend = el("div", { class: "reading" });
  let at = last;

  function read(step, hovering) {
    at = step;
    cursor.setAttribute("visibility", hovering ? "visible" : "hidden");
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    const rows = reading(series, step);
    legend.replaceChildren(
      el("span", { class: "step" }, `step ${step}`),
      ...rows.map((row) =>
        el("span", { class: "series" }, key(row.colour, row.dash), `${row.label} `,
          el("b", {}, row.text))),
    );
    plot.setAttribute("aria-valuenow", step);
    plot.setAttribute("aria-valuetext", `step ${step}: ${rows.map((row) => `${row.label} ${row.text}`).join(", ")}`);
  }

  function nearest(event) {
    const box = drawing.getBoundingClientRect();
    const left = ((event.clientX - box.left) / box.width) * WIDTH;
    return steps.reduce((best, step) => (Math.abs(x(step) - left) < Math.abs(x(best) - left) ? step : best), steps[0]);
  }

  function move(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Enter" && onstep) onstep(at);
    if (!by) return;
    event.preventDefault();
    read(steps[Math.max(0, Math.min(steps.length - 1, steps.indexOf(at) + by))], true);
  }

  const plot = el(
    "div",
    {
      class: "plot", role: "slider", tabindex: 0, "aria-label": `${title}, by step`,
      "aria-valuemin": first, "aria-valuemax": last,
      onmousemove: (event) => read(nearest(event), true),
      onmouseleave: () => read(last, false),
      onblur: () => read(last, false),
      onkeydown: move,
      onclick: (event) => onstep && onstep(nearest(event)),
    },
    drawing,
  );
  read(last, false);
  return el("figure", { class: "chart" }, el("figcaption", {}, title), plot, legend);
}
