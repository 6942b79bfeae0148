// The questions of a run: filters, a table that sorts, pages.

import { el } from "inspector/dom";
import { number, range, signed } from "inspector/format";
import { RANGES, go, link, put, questionPlace, searchOf } from "inspector/route";
import { source } from "inspector/source";

const PAGE = 100;
const FLAG_NAMES = {
  changed: "answer changed",
  gold_nowhere: "gold answer in no cluster",
  right_negative: "right answer got negative advantage",
  stale_paid: "stale answer paid",
  no_answer: "no answer",
  no_update: "no update",
  dropped: "left out",
};
const ABOUT = {
  step: "step of the training",
  clusters: "clusters of the question's answers",
  outcome: "EM or success, the mean over the question's rollouts",
  turns: "turns of a rollout; a range holds if it holds for one of them",
  reward: "sum of a rollout's turn rewards; a range holds if it holds for one of them",
  advantage: "advantage of a turn; a range holds if it holds for one of them",
};
// [title, column to sort by, whether larger ones come first]
const COLUMNS = [
  ["step", "step", false], ["question", "question", false], ["heaviest answer", null], ["clusters", "clusters", true],
  ["outcome", "outcome", true], ["turns", "turns_max", true], ["reward", "reward_max", true],
  ["advantage", "advantage_min", false], ["", null],
];

function filters(values, overview, changed) {
  const field = (name, label, attributes) =>
    el("input", { ...attributes, name, value: values[name] || "", "aria-label": label, oninput: changed });
  const chosen = (values.flags || "").split(",");
  return el("form", { class: "filters", role: "search", "aria-label": "Questions", onsubmit: (e) => e.preventDefault() },
    field("text", "Text of the question or answer", { type: "search", placeholder: "question or answer   /", class: "text" }),
    Object.entries(RANGES).map(([name, label]) =>
      el("span", { class: "range", role: "group", "aria-label": label, title: ABOUT[name] }, el("span", { class: "name" }, label),
        field(`${name}_from`, `${label} from`, { type: "number", step: "any", placeholder: "from" }),
        field(`${name}_to`, `${label} to`, { type: "number", step: "any", placeholder: "to" }))),
    el("span", { class: "flags" }, Object.keys(overview.flags).map((flag) =>
      el("label", { title: overview.flags[flag] },
        el("input", { type: "checkbox", name: "flag", value: flag, checked: chosen.includes(flag), onchange: changed }),
        FLAG_NAMES[flag] || flag))),
    el("button", { type: "button", onclick: () => go("questions", { run: values.run }) }, "Clear"));
}

function read(form, values) {
  const found = { run: values.run, sort: values.sort, descending: values.descending };
  for (const input of form.querySelectorAll("input:not([name=flag])")) found[input.name] = input.value.trim();
  found.flags = [...form.querySelectorAll("input[name=flag]:checked")].map((input) => input.value).join(",");
  return found;
}

function headings(values) {
  return el("tr", {}, COLUMNS.map(([title, sort, descending]) => {
    if (!sort) return el("th", { scope: "col" }, title || el("span", { class: "hidden" }, "remarks"));
    const now = (values.sort || "step") === sort;
    const turned = now ? !values.descending : descending;
    return el("th", { scope: "col", "aria-sort": now ? (values.descending ? "descending" : "ascending") : null },
      el("a", { title: ABOUT[title], href: link("questions", { ...values, at: "", offset: 0, sort, descending: turned ? 1 : "" }) },
        title, now ? (values.descending ? " ↓" : " ↑") : ""));
  }));
}

function row(question, at, values) {
  const href = link("question", questionPlace(values, question, at));
  const flags = Object.keys(FLAG_NAMES).filter((flag) => question[flag] > 0);
  return el("tr", {},
    el("td", { class: "n" }, question.step),
    el("td", {}, el("a", { href, class: "open", dataset: { at } }, question.question || "(no question)")),
    el("td", {}, el("div", { class: "few" }, question.answer || "–")),
    el("td", { class: "n" }, number(question.clusters)),
    el("td", { class: "n" }, number(question.outcome, 2)),
    el("td", { class: "n" }, range(question.turns_min, question.turns_max)),
    el("td", { class: "n" }, question.reward_min === null ? "–" : range(question.reward_min, question.reward_max, 2)),
    el("td", { class: "n" }, question.advantage_min === null ? "–"
      : `${signed(question.advantage_min, 2)} to ${signed(question.advantage_max, 2)}`),
    el("td", {}, flags.map((flag) => el("span", { class: `flag ${flag}` }, FLAG_NAMES[flag]))));
}

function pager(total, offset, values) {
  const to = (start, text) => el("a", { href: link("questions", { ...values, at: "", offset: start }) }, text);
  return el("nav", { class: "pager", "aria-label": "Pages" },
    el("span", {}, total ? `${offset + 1} to ${Math.min(total, offset + PAGE)} of ${total.toLocaleString("en-US")}`
      : "No question matches."),
    offset > 0 && to(Math.max(0, offset - PAGE), "← earlier"),
    offset + PAGE < total && to(offset + PAGE, "later →"));
}

export async function listView(values, overview) {
  // Back from a question: the page that it is on.
  const offset = Number(values.offset || 0) || Math.floor(Number(values.at || 0) / PAGE) * PAGE;
  const place = el("div", { class: "results" });
  let asked = 0;

  async function fill(now, start) {
    const mine = ++asked;
    let found;
    try {
      found = await source.questions(now.run, { ...searchOf(now), offset: start, limit: PAGE });
    } catch (error) {
      if (mine === asked) place.replaceChildren(el("p", { class: "error", role: "alert" }, error.message));
      return;
    }
    // An answer that was overtaken by a later one is none.
    if (mine !== asked) return;
    place.replaceChildren(
      pager(found.total, start, now),
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "List of questions" },
        el("table", {}, el("thead", {}, headings(now)),
          el("tbody", {}, found.questions.map((question, index) => row(question, start + index, now))))));
  }

  const form = filters(values, overview, () => {
    const now = read(form, values);
    put("questions", now);
    fill(now, 0);
  });
  await fill(values, offset);
  return [el("h1", {}, "Questions"), form, place];
}
