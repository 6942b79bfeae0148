// The keyboard: everything that the mouse does.

import { announce, el } from "inspector/dom";
import { go, parse, questionPlace, searchOf } from "inspector/route";
import { source } from "inspector/source";

const KEYS = [
  ["j, k", "next and previous question, in the order of the list"],
  ["l, h", "next and previous rollout"],
  ["g", "show or hide the gold answer"],
  ["/", "find a question"],
  ["c, q", "curves, questions"],
  ["u", "back to the list"],
  ["Tab, arrows", "through queries, passages and charts; what is the same elsewhere lights up"],
  ["?", "this help"],
];

const click = (selector) => {
  const node = document.querySelector(selector);
  if (node) node.click();
  return Boolean(node);
};

// The item that lies `by` further; the first step leads to the first item.
const further = (items, at, by) => items[Math.max(0, Math.min(items.length - 1, at < 0 ? by - 1 : at + by))];

// In the list j and k walk its rows, in a question the questions.
function walk(by) {
  const { view, values } = parse();
  if (view === "question") return toQuestion(values, by);
  const rows = [...document.querySelectorAll("a.open")];
  return further(rows, rows.indexOf(document.activeElement), by)?.focus();
}

async function toQuestion(values, by) {
  if (values.at === undefined) return announce("This question was not opened from a list: u shows it", true);
  const find = (offset) => source.questions(values.run, { ...searchOf(values), offset, limit: 1 });
  let at = Math.max(0, Number(values.at) + by);
  let found = await find(at);
  if (!found.questions.length && found.total) {
    at = found.total - 1;
    found = await find(at);
  }
  const [one] = found.questions;
  if (!one || at === Number(values.at)) return announce(`This is the ${by > 0 ? "last" : "first"} question`, true);
  return go("question", questionPlace(values, one, at));
}

function rollout(by) {
  const all = [...document.querySelectorAll(".rollout")];
  if (!all.length) return;
  const at = all.findIndex((one) => one.classList.contains("chosen"));
  all.forEach((one) => one.classList.remove("chosen"));
  const next = further(all, at, by);
  next.classList.add("chosen");
  next.querySelector("header").scrollIntoView({ block: "nearest", inline: "nearest" });
  announce(next.getAttribute("aria-label"));
}

function find() {
  const field = document.querySelector("input[name=text]");
  if (field) field.focus();
  else click("#to-questions");
}

// What a key does, and by how much.
const ACTIONS = {
  j: [walk, 1], k: [walk, -1], l: [rollout, 1], h: [rollout, -1], g: [() => click("#gold")],
  c: [() => click("#to-curves")], q: [() => click("#to-questions")], u: [() => click("#back")], "/": [find],
  "?": [() => help()],
};

// Keys that were pressed before the page that an earlier one leads to was there: they act on that page. Steps in a row
// are one step, so that no page is loaded that nobody looks at.
const pressed = [];
let working = false;

function press(action, by) {
  const last = pressed[pressed.length - 1];
  if (by && last && last.action === action) last.by += by;
  else pressed.push({ action, by });
}

async function work(settled) {
  if (working) return;
  working = true;
  try {
    while (pressed.length) {
      await settled();
      const { action, by } = pressed.shift();
      const before = location.hash;
      if (by !== 0) await action(by);
      if (location.hash !== before) await new Promise((resolve) => setTimeout(resolve)); // for its event
    }
  } catch (error) {
    pressed.length = 0;
    announce(error.message, true);
  } finally {
    working = false;
  }
}

export function help() {
  const dialog = document.getElementById("help");
  dialog.replaceChildren(el("h1", {}, "Keys"),
    el("dl", {}, KEYS.flatMap(([keys, what]) => [el("dt", {}, keys), el("dd", {}, what)])),
    el("button", { type: "button", onclick: () => dialog.close() }, "Close"));
  dialog.showModal();
}

// settled: resolves when what the address names is drawn.
export function listen(settled) {
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "checkbox";
    if (event.key === "Escape" && typing) event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
    if (Object.hasOwn(ACTIONS, event.key)) {
      event.preventDefault();
      press(...ACTIONS[event.key]);
      work(settled);
    }
  });
}
