// The data of an exported file, searched as the service searches it (index.py).

// What differs between the rollouts of a question, so that a range holds if it holds for one.
const SPREAD = ["reward", "advantage", "turns"];

function matches(question, search) {
  const bounded = (low, high, name) => {
    const from = search[`${name}_from`];
    const to = search[`${name}_to`];
    if (from && !(high !== null && high >= Number(from))) return false;
    return !(to && !(low !== null && low <= Number(to)));
  };
  for (const name of ["step", "clusters", "outcome"]) {
    if (!bounded(question[name], question[name], name)) return false;
  }
  for (const name of SPREAD) {
    if (!bounded(question[`${name}_min`], question[`${name}_max`], name)) return false;
  }
  if (search.flags && !search.flags.split(",").every((flag) => question[flag] > 0)) return false;
  const text = (search.text || "").toLowerCase();
  return !text || question.question.toLowerCase().includes(text) || question.answer.toLowerCase().includes(text);
}

function order(search) {
  const name = search.sort || "step";
  const sign = search.descending ? -1 : 1;
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  return (a, b) =>
    (a[name] === null) - (b[name] === null) ||
    sign * compare(a[name], b[name]) ||
    sign * compare(a.step, b.step) ||
    compare(a.place, b.place);
}

// gzip in base64, see export.py.
function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

export function embedded(data) {
  const of = (run) => data.runs[run] || Promise.reject(new Error(`no run ${run} in this file`));
  return {
    live: false,
    runs: async () => data.overview,
    curves: async (run) => (await of(run)).curves,
    async questions(run, search) {
      const found = (await of(run)).questions.filter((question) => matches(question, search)).sort(order(search));
      const offset = Number(search.offset || 0);
      return { total: found.length, questions: found.slice(offset, offset + Number(search.limit || 100)) };
    },
    async question(run, step, group) {
      const found = (await of(run)).details[`${step}/${group}`];
      if (!found) throw new Error("this question's rollouts were left out of this file to bound its size");
      return found;
    },
    async lines(run, step, group) {
      const { lines, settings } = await of(run);
      const rollouts = JSON.parse(await unpacked(lines[`${step}/${group}`]));
      return { rollouts, settings: settings[rollouts[0].settings] || null };
    },
  };
}
