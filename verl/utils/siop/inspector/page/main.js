// The page: a bar, and the view that the address names. It follows a training that goes on.

import { curvesView } from "inspector/curves_view";
import { key } from "inspector/chart";
import { el, show } from "inspector/dom";
import { help, listen } from "inspector/keys";
import { listView } from "inspector/list_view";
import { questionView } from "inspector/question_view";
import { go, link, listOf, namesOf, parse, searchOf } from "inspector/route";
import { source } from "inspector/source";

const EVERY_MS = 2000;
const THEMES = ["auto", "light", "dark"];
const VIEWS = { curves: curvesView, questions: listView, question: questionView };

let overview;
let drawn = 0;
let drawing = Promise.resolve();
// Since when the service does not answer.
let lost = "";

function chosen(values) {
  const names = overview.runs.map((run) => run.name);
  const wanted = (values.runs ? namesOf(values.runs) : [values.run]).filter((name) => names.includes(name));
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
  const button = el("button", { type: "button", "aria-label": "Colours", title: "colours: as the system has them, light, dark" }, theme());
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
          if (!several) return go("questions", { run: name, ...searchOf(values) });
          const next = names.filter((one) => (one === name ? event.target.checked : now.includes(one)));
          if (!next.length) event.target.checked = true; // one is always shown
          return go("curves", { runs: listOf(next.length ? next : now) });
        },
      }),
      several && key(`c${place % 8}`), name)));
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
    lost && el("span", { class: "lost", role: "alert" }, lost),
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
  if (!focus) return;
  // Back in the list: the question that was left.
  const left = view === "questions" && values.at && main.querySelector(`a.open[data-at="${CSS.escape(values.at)}"]`);
  if (left) left.focus();
  else main.focus({ preventScroll: true });
}

// A question that is open stays as it is, and so does all that has the focus or the mouse; the rest is drawn anew.
async function follow() {
  try {
    const next = await source.runs();
    const changed = JSON.stringify(next) !== JSON.stringify(overview);
    overview = next;
    const { view, values } = parse();
    const busy = ![document.body, document.getElementById("main")].includes(document.activeElement);
    if (lost) {
      lost = "";
      bar(view, values);
    }
    if (changed && view !== "question" && !busy && !document.querySelector(".plot:hover")) await draw(false);
  } catch (error) {
    if (!lost) {
      const { view, values } = parse();
      lost = `no answer since ${new Date().toLocaleTimeString()} (${error.message}): this is what was there before`;
      bar(view, values);
    }
  }
  setTimeout(follow, EVERY_MS);
}

// What the address names is drawn, whatever it comes to name meanwhile.
async function settled() {
  for (let last; last !== drawing; ) {
    last = drawing;
    await last;
  }
}

setTheme(theme());
listen(settled);
addEventListener("hashchange", () => {
  drawing = draw(true);
});
drawing = draw(false);
await drawing;
if (source.live) setTimeout(follow, EVERY_MS);
