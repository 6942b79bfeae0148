// The keyboard: everything that the mouse does.

import { announce, el } from "inspector/dom";

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

// In the list j and k walk its rows, in a question the questions.
function walk(by) {
  if (click(by > 0 ? "#after" : "#before")) return;
  const rows = [...document.querySelectorAll("a.open")];
  const at = rows.indexOf(document.activeElement);
  rows[Math.max(0, Math.min(rows.length - 1, at < 0 ? 0 : at + by))]?.focus();
}

function rollout(by) {
  const all = [...document.querySelectorAll(".rollout")];
  if (!all.length) return;
  const at = all.findIndex((one) => one.classList.contains("chosen"));
  all.forEach((one) => one.classList.remove("chosen"));
  const next = all[at < 0 ? 0 : Math.max(0, Math.min(all.length - 1, at + by))];
  next.classList.add("chosen");
  next.querySelector("header").scrollIntoView({ block: "nearest", inline: "nearest" });
  announce(next.getAttribute("aria-label"));
}

function find() {
  const field = document.querySelector("input[name=text]");
  if (field) field.focus();
  else click("#to-questions");
}

const ACTIONS = {
  j: () => walk(1), k: () => walk(-1), l: () => rollout(1), h: () => rollout(-1), g: () => click("#gold"),
  c: () => click("#to-curves"), q: () => click("#to-questions"), u: () => click("#back"), "/": find, "?": () => help(),
};

export function help() {
  const dialog = document.getElementById("help");
  dialog.replaceChildren(el("h1", {}, "Keys"),
    el("dl", {}, KEYS.flatMap(([keys, what]) => [el("dt", {}, keys), el("dd", {}, what)])),
    el("button", { type: "button", onclick: () => dialog.close() }, "Close"));
  dialog.showModal();
}

export function listen() {
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "checkbox";
    if (event.key === "Escape" && typing) event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || document.getElementById("help").open) return;
    const action = ACTIONS[event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  });
}
