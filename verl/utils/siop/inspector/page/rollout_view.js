// One rollout as a column: its answer, its support, a card for each turn.

import { el } from "inspector/dom";
import { CLUSTER_COLOURS, clusterName, heat, number, signed } from "inspector/format";
import { supportCurve } from "inspector/support_curve";

const LABELS = { think: "thinks", call: "calls", passage: "", answer: "answers", action: "acts", text: "" };
// [key, name, what it is]
const VALUES = [
  ["gain", "gain", "what the support of the cluster gained by this turn"],
  ["score", "score", "what the environment gave this turn"],
  ["reward", "reward", "what the method paid for this turn"],
  ["kl_reward", "with KL", "the reward after the KL penalty"],
  ["return", "return", "what the turn is worth: its reward and those that follow"],
];

function piece(segment, keyed) {
  const label = LABELS[segment.kind];
  const node = el("div", { class: `piece ${segment.kind}`, dataset: { kind: segment.kind } },
    label ? el("span", { class: "label" }, label) : null, segment.text);
  if (segment.keys.length) {
    node.dataset.keys = segment.keys.join(" ");
    node.tabIndex = 0;
    node.setAttribute("role", "group");
    node.setAttribute("aria-label", `${segment.kind}: ${segment.text}`);
    node.addEventListener("mouseenter", () => keyed(segment.keys));
    node.addEventListener("focus", () => keyed(segment.keys));
    node.addEventListener("mouseleave", () => keyed([]));
    node.addEventListener("blur", () => keyed([]));
  }
  return node;
}

function head(turn, number_, other, largest) {
  const { side, share } = heat(turn.advantage, largest);
  const values = VALUES.filter(([key]) => turn[key] !== undefined).map(([key, name, what]) =>
    el("span", { class: "value", title: what }, `${name} `, el("b", {}, signed(turn[key]))));
  return el("div", { class: `head ${side}`, style: { "--share": share.toFixed(3) } },
    el("div", { class: "first" },
      el("span", { class: "number" }, turn.before ? "before the first turn" : `turn ${number_}`),
      turn.advantage === undefined ? null
        : el("span", { class: "advantage", title: "what the update multiplies this turn's log-probs by" },
          "advantage ", el("b", {}, signed(turn.advantage, 2)))),
    values,
    other && el("span", { class: "value other", title: "reward and advantage under the other keys" },
      `other keys: reward ${signed(other.reward)}, advantage `, el("b", {}, signed(other.advantage, 2))));
}

function card(turn, place, column, rollout, largest, keyed) {
  const other = rollout.other && !turn.before
    ? { reward: rollout.other.rewards[place], advantage: rollout.other.advantages[place] } : null;
  const tokens = turn.tokens ? `tokens ${turn.tokens[0]} to ${turn.tokens[1]}` : "";
  return el("section",
    { class: "turn", style: { "grid-column": column, "grid-row": place + 2 }, title: tokens,
      "aria-label": `Rollout ${rollout.session}, turn ${place + 1}, advantage ${signed(turn.advantage, 2)}` },
    head(turn, place + 1, other, largest),
    el("div", { class: "body" }, turn.segments.map((one) => piece(one, keyed)),
      turn.results.length ? el("div", { class: "results" }, turn.results.map((one) => piece(one, keyed))) : null,
      turn.cut ? el("em", {}, `${turn.cut} more characters are in the dump`) : null));
}

function facts(rollout) {
  const found = rollout.answer === null ? [] : [`rollout ${rollout.session}`];
  for (const [name, value] of Object.entries(rollout.outcomes)) found.push(`${name} ${number(value, 2)}`);
  if (rollout.score !== null) found.push(`reward ${signed(rollout.score)}`);
  for (const [name, count] of Object.entries(rollout.calls)) found.push(`${name.replaceAll("_", " ")} ${count}`);
  return found.join(" · ");
}

// places: cluster id → place by weight. copy: name, what is copied and how, of each button.
export function rolloutColumn(rollout, column, places, largest, keyed, copy) {
  const place = places.get(rollout.cluster);
  const colour = place === undefined ? "" : `k${place % CLUSTER_COLOURS}`;
  // Games ask for no answer.
  const title = rollout.answer || (rollout.answer === null ? `rollout ${rollout.session}` : "no answer");
  const header = el("header", { style: { "grid-column": column } },
    el("span", { class: "copy" }, copy.map(([name, what, action]) =>
      el("button", { type: "button", onclick: () => action(rollout), title: `copy the rollout as ${what}`,
        "aria-label": `Copy rollout ${rollout.session} as ${name}` }, name))),
    el("h2", {}, place === undefined ? null : el("span", { class: "badge" }, clusterName(place)), title),
    el("div", { class: "numbers" }, facts(rollout)),
    rollout.support.length ? el("div", { class: "support" }, supportCurve(rollout.support, rollout.boundaries)) : null);
  let turn = 0;
  const cards = rollout.turns.map((one) => card(one, one.before ? 0 : turn++, column, rollout, largest, keyed));
  return el("article", { class: `rollout ${colour}`, dataset: { session: rollout.session },
    "aria-label": `Rollout ${rollout.session}: ${title}` }, header, cards);
}
