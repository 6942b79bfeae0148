// The question view: the clusters, and all rollouts side by side.

import { announce, el } from "inspector/dom";
import { CLUSTER_COLOURS, clusterName, counted, number } from "inspector/format";
import { rolloutColumn } from "inspector/rollout_view";
import { link, questionPlace, searchOf } from "inspector/route";
import { source } from "inspector/source";
import { testCase } from "inspector/test_case";

const ABOUT_CLUSTERS = "q: target, the share of what this answer is paid; mass: share of the rollouts with an answer; " +
  "votes: that share once votes have passed on (siop_vote); evidence: how well the passages that they found support it";

function clusterList(clusters) {
  return el("ul", { class: "clusters", "aria-label": "Clusters of answers" }, clusters.map((cluster, place) =>
    el("li", { class: `cluster k${place % CLUSTER_COLOURS}` },
      el("span", { class: "badge" }, clusterName(place)), cluster.references.join(" / ") || "–",
      el("div", { class: "numbers", title: ABOUT_CLUSTERS },
        `q ${number(cluster.target, 3)} · mass ${number(cluster.mass, 3)} · ` +
        (cluster.votes === null ? "" : `votes ${number(cluster.votes, 3)} · `) +
        `evidence ${number(cluster.evidence, 3)} · ` +
        counted(cluster.size, "rollout")))));
}

// The same query or passage, wherever it stands.
function highlighter(root) {
  return (keys) => {
    for (const node of root.querySelectorAll("[data-keys]")) {
      node.classList.toggle("same", keys.some((key) => node.dataset.keys.split(" ").includes(key)));
    }
  };
}

async function copy(text, what) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without permission, as over plain HTTP from another machine.
    const area = el("textarea", { "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
  }
  if (!copied) throw new Error("the browser does not allow it");
  announce(`Copied ${what}`, true);
}

function copiers(values, question) {
  const copier = (what, text) => async (rollout) => {
    try {
      await copy(text(await source.lines(values.run, values.step, values.group), rollout), `the rollout as ${what}`);
    } catch (error) {
      announce(`Not copied as ${what}: ${error.message}`, true);
    }
  };
  const json = ({ rollouts }, rollout) => JSON.stringify(rollouts.find((line) => line.uid === rollout.uid), null, 1);
  const found = [["JSON", "JSON", copier("JSON", json)]];
  if (question.version > 1) found.push(["test", "a test case", copier("a test case", testCase)]);
  return found;
}

async function neighbours(values) {
  if (values.at === undefined) return [null, null];
  const at = Number(values.at);
  const start = Math.max(0, at - 1);
  const found = await source.questions(values.run, { ...searchOf(values), offset: start, limit: 3 });
  const address = (place) => {
    const one = found.questions[place - start];
    return one && link("question", questionPlace(values, one, place));
  };
  return [at > 0 ? address(at - 1) : null, address(at + 1)];
}

function tools(values, question, before, after) {
  const gold = el("button", { type: "button", id: "gold", "aria-pressed": "false" }, "Show gold answer");
  const shown = el("span", { class: "gold", id: "gold-text" });
  gold.addEventListener("click", () => {
    const show = gold.getAttribute("aria-pressed") === "false";
    gold.setAttribute("aria-pressed", String(show));
    gold.textContent = show ? "Hide gold answer" : "Show gold answer";
    shown.textContent = show ? question.gold.join(" / ") || "no label" : "";
  });
  return el("div", { class: "tools" },
    el("a", { id: "back", href: link("questions", { run: values.run, at: values.at, ...searchOf(values) }) }, "← list"),
    before ? el("a", { id: "before", href: before }, "previous (k)") : null,
    after ? el("a", { id: "after", href: after }, "next (j)") : null,
    el("span", {}, `step ${question.step} · ${question.method || "dump version 1"} · ${counted(question.rollouts.length, "rollout")} (h, l)`),
    gold, shown);
}

function notes(question, overview) {
  const found = [];
  if (question.dropped) found.push("This question was left out of the update: the scorer failed on it.");
  if (question.version === 1) found.push("Dump version 1: it holds no advantages and no token ranges.");
  if (question.not_finite.length) found.push(`Not a number in the dump, shown as –: ${question.not_finite.join(", ")}.`);
  if (overview.recompute) {
    const { name, kept } = overview.recompute;
    const names = Object.keys(kept);
    found.push(question.recompute_problem
      ? `Not recomputed under ${name}: ${question.recompute_problem}`
      : `Other keys: ${name}.${names.length ? ` As in the training, because they take new scores: ${names.join(", ")}.` : ""}`);
  }
  return found.map((text) => el("p", { class: "note" }, text));
}

function asked(values, question) {
  const others = question.asked.filter((one) =>
    one.run !== values.run || one.step !== question.step || one.group !== question.group);
  if (!others.length) return null;
  return el("section", { class: "asked" }, el("h2", {}, "The same question"), el("ul", {}, others.map((one) =>
    el("li", {}, el("a", { href: link("question", { run: one.run, step: one.step, group: one.group }) },
      `${one.run}, step ${one.step}`), ` · outcome ${number(one.outcome, 2)} · ${one.answer || "no answer"}`))));
}

export async function questionView(values, overview) {
  const [question, [before, after]] = await Promise.all([
    source.question(values.run, Number(values.step), values.group), neighbours(values),
  ]);
  const places = new Map(question.clusters.map((cluster, place) => [cluster.id, place]));
  const largest = Math.max(0, ...question.rollouts.flatMap((one) => one.turns.map((turn) => Math.abs(turn.advantage || 0))));
  const columns = el("div", { class: "columns", tabindex: 0, role: "region", "aria-label": "Rollouts" });
  const copying = copiers(values, question);
  const keyed = highlighter(columns);
  // By the weight of the cluster, those without one last.
  const place = (one) => places.get(one.cluster) ?? places.size;
  const sorted = [...question.rollouts].sort((a, b) => place(a) - place(b) || a.session - b.session);
  columns.append(...sorted.map((one, column) =>
    rolloutColumn(one, column + 1, places, largest, keyed, copying)));
  return [
    tools(values, question, before, after),
    el("h1", { class: `question${question.question.includes("\n") ? " board" : ""}`, tabindex: question.question.length > 500 ? 0 : null }, question.question || "(no question)"),
    ...notes(question, overview),
    clusterList(question.clusters),
    columns,
    el("details", {}, el("summary", {}, "Prompt"), el("div", { class: "piece text" }, question.prompt)),
    asked(values, question),
  ].filter(Boolean);
}
