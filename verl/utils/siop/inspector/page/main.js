// The page: a bar, and the view that the address names. It follows a training that goes on.

import { curvesView } from "inspector/curves_view";
import { el, show } from "inspector/dom";
import { help, listen } from "inspector/keys";
import { listView } from "inspector/list_view";
import { questionView } from "inspector/question_view";
import { go, link, parse } from "inspector/route";
import { source } from "inspector/source";

const EVERY_MS = 2000;
const THEMES = ["auto", "light", "dark"];
const VIEWS = { curves: curvesView, questions: listView, question: questionView };

let overview;
let drawn = 0;

function chosen(values) {
  const names = overview.runs.map((run) => run.name);
  const wanted = (values.runs || values.run || "").split(",").filter((name) => names.includes(name));
  return wanted.length ? wanted : names;
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function theme() {
  try {
    return localStorage.getItem("theme") || "auto";
  } catch {
    return "auto";
  }
}

function themeButton() {
  const button = el("button", { type: "button", "aria-label": "Colours" }, theme());
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(button.textContent) + 1) % THEMES.length];
    button.textContent = next;
    setTheme(next);
    try {
      localStorage.setItem("theme", next);
    } catch {
      // A browser that keeps nothing: for this time only.
    }
  });
  return button;
}

function runSwitch(view, values) {
  const names = overview.runs.map((run) => run.name);
  if (names.length < 2) return el("span", {}, names[0] || "");
  const several = view === "curves";
  const now = several ? chosen(values) : chosen(values).slice(0, 1);
  return el("fieldset", { class: "runs" }, el("legend", { class: "hidden" }, "Runs"), names.map((name, place) =>
    el("label", {},
      el("input", {
        type: several ? "checkbox" : "radio", name: "run", value: name, checked: now.includes(name),
        onchange: (event) => {
          if (!several) return go("questions", { run: name });
          const next = names.filter((one) => (one === name ? event.target.checked : now.includes(one)));
          return go("curves", { runs: next.join(",") });
        },
      }),
      several && el("i", { class: `key c${place % 6}` }), name)));
}

function bar(view, values) {
  const run = chosen(values)[0];
  const tab = (name, title) => el("a", {
    id: `to-${name}`, href: link(name, name === "curves" ? { runs: values.runs } : { run }),
    "aria-current": view === name ? "page" : null,
  }, title);
  show(document.getElementById("bar"),
    el("span", { class: "brand" }, "Turn credit"),
    el("nav", { "aria-label": "Views" }, tab("curves", "Curves"), tab("questions", "Questions")),
    runSwitch(view, values),
    el("span", { class: "end" }, source.live ? null : el("span", {}, overview.exported),
      themeButton(), el("button", { type: "button", onclick: help, "aria-label": "Keys" }, "?")));
}

async function draw(focus) {
  const mine = ++drawn;
  const main = document.getElementById("main");
  const { view, values } = parse();
  try {
    if (!overview) overview = await source.runs();
    const names = chosen(values);
    if (!VIEWS[view]) throw new Error(`there is no view ${view}`);
    if (!names.length) throw new Error("there is no run");
    const nodes = await VIEWS[view]({ ...values, run: values.run || names[0] }, overview, names);
    if (mine !== drawn) return;
    bar(view, values);
    show(main, ...nodes);
    document.title = `${view === "question" ? values.step + ": " + document.querySelector("h1").textContent : view} · Turn credit`;
  } catch (error) {
    if (mine !== drawn) return;
    if (overview) bar(view, values);
    show(main, el("p", { class: "error", role: "alert" }, error.message));
  }
  if (focus) main.focus({ preventScroll: true });
}

// What a reader has open stays as it is; only the curves, and the list where nobody types, are drawn anew.
async function follow() {
  try {
    const next = await source.runs();
    const changed = JSON.stringify(next) !== JSON.stringify(overview);
    overview = next;
    const { view } = parse();
    const busy = document.getElementById("main").contains(document.activeElement) && document.activeElement.id !== "main";
    if (changed && view === "curves" && !busy && !document.querySelector(".plot:hover")) await draw(false);
  } catch {
    // The service has ended: what is shown stays.
  }
  setTimeout(follow, EVERY_MS);
}

setTheme(theme());
listen();
addEventListener("hashchange", () => draw(true));
await draw(false);
if (source.live) setTimeout(follow, EVERY_MS);
