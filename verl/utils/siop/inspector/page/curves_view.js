// The run view: what is known to go wrong, and the curves of one run or several.

import { chart } from "inspector/chart";
import { el } from "inspector/dom";
import { counted, number } from "inspector/format";
import { go } from "inspector/route";
import { source } from "inspector/source";

const DASHES = 4;
const OUTCOME = "siop/outcome/";
const COLOURS = 8;

// [title, names of metrics or a pattern of them, what the label of a match is]
const CHARTS = [
  ["Outcome", /^siop\/outcome\/(.+)$/],
  ["Turns of a rollout", ["siop/turns/mean"]],
  ["Share of rollouts without an answer", ["siop/no_answer"]],
  ["Clusters of a question", ["siop/clusters_per_group"]],
  ["Entropy of the clusters, nats", ["siop/cluster_entropy"]],
  ["Heaviest cluster is right", ["siop/heaviest_cluster_right"]],
  ["Support before the first and at the last turn", /^siop\/support_(first|last)$/],
  ["Reward by turn", /^siop\/turn_reward\/turn_(\d+)\/mean$/],
  ["Share of questions without variance", ["siop/zero_variance_groups"]],
  ["Seconds by phase", /^timing_s\/(gen|old_log_prob|siop_rewards|update_actor|update_weights|step)$/],
  ["Seconds of the scorer", /^siop\/seconds\/(.+)$/],
  ["Tokens of the scorer", /^siop\/tokens\/(.+)$/],
];
const LABELS = { gen: "generation", old_log_prob: "log-probs", siop_rewards: "rewards", update_actor: "update",
  update_weights: "weight sync", step: "whole step" };

function labelled(which, metrics) {
  if (Array.isArray(which)) return which.filter((name) => metrics[name]).map((name) => [name, ""]);
  return Object.keys(metrics)
    .map((name) => [name, which.exec(name)])
    .filter(([, match]) => match)
    .map(([name, match]) => [name, LABELS[match[1]] || (/^\d+$/.test(match[1]) ? `turn ${match[1]}` : match[1])])
    .slice(0, 8);
}

// With one run the colour says the series; with several it says the run, and the dash the series.
function seriesOf(which, runs) {
  return runs.flatMap(({ name, curves }, run) =>
    labelled(which, curves.metrics).map(([metric, label], place) => ({
      label: runs.length > 1 ? `${name} ${label}`.trim() : label || "mean",
      steps: curves.steps,
      values: curves.metrics[metric],
      colour: `c${(runs.length > 1 ? run : place) % COLOURS}`,
      dash: runs.length > 1 && place ? `d${place % DASHES}` : "",
    })));
}

function alarmList(runs) {
  const rows = runs.flatMap(({ name, curves }) =>
    curves.alarms.map((alarm) =>
      el("li", {},
        el("strong", {}, runs.length > 1 ? `${name}, from step ${alarm.step}: ` : `From step ${alarm.step}: `),
        `${alarm.text}. `,
        el("a", { href: `#/questions?run=${encodeURIComponent(name)}&step_from=${alarm.step}` }, "See its questions"))));
  return rows.length ? el("section", { class: "alarms", "aria-label": "Alarms" }, el("ul", {}, rows)) : null;
}

function summary(runs) {
  return runs.map(({ state, curves }) => {
    const em = curves.metrics[`${OUTCOME}em`] || curves.metrics[`${OUTCOME}success`];
    const last = em ? `, outcome ${number(em[0], 2)} → ${number(em[em.length - 1], 2)}` : "";
    const waiting = state.waiting ? `, ${counted(state.waiting, "step")} still to be read` : "";
    const old = state.version === 1 ? " · dump version 1: no advantages, no token ranges, no seconds" : "";
    return el("p", { class: "summary" }, el("b", {}, state.name),
      ` ${counted(state.steps, "step")}, ${counted(state.rollouts, "rollout")}${last}${waiting}${old}`);
  });
}

export async function curvesView(values, overview, names) {
  const runs = await Promise.all(
    names.map(async (name) => ({
      name, curves: await source.curves(name), state: overview.runs.find((run) => run.name === name),
    })));
  const there = runs.filter((run) => run.curves.steps.length);
  const problems = runs.flatMap((run) => run.state.problems);
  const head = [el("h1", {}, runs.length > 1 ? "Runs side by side" : "Run"), ...summary(runs)];
  if (problems.length) {
    head.push(el("section", { class: "alarms", "aria-label": "Unreadable" },
      el("ul", {}, problems.slice(0, 20).map((text) => el("li", {}, text)))));
  }
  if (!there.length) return [...head, el("p", {}, "No step has been dumped yet; the page follows.")];
  const grid = CHARTS.map(([title, which]) => {
    const series = seriesOf(which, there);
    const marks = there.flatMap((run) => run.curves.alarms)
      .filter((alarm) => series.length && labelled(which, { [alarm.metric]: [] }).length).map((alarm) => alarm.step);
    const onstep = (step) => go("questions", { run: names[0], step_from: step, step_to: step });
    return series.some((one) => one.values.some((value) => value !== null)) && chart({ title, series, marks, onstep });
  });
  return [...head, alarmList(there), el("p", { class: "hint" }, "Click on a step, or press Enter on it, to see its questions."),
    el("div", { class: "charts" }, grid.filter(Boolean))].filter(Boolean);
}
