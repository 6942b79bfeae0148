// Where the data comes from: the service, or what is embedded in this file.

import { embedded } from "inspector/embedded";

async function get(path, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values || {})) {
    for (const item of Array.isArray(value) ? value : [value]) query.append(name, item);
  }
  const answer = await fetch(`/api/${path}?${query}`);
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const detail = body.detail;
    throw new Error(typeof detail === "string" ? detail : `${answer.status} ${JSON.stringify(detail || "")}`);
  }
  return body;
}

function searchValues(search) {
  const { flags, ...rest } = search;
  return flags ? { ...rest, flags: flags.split(",") } : rest;
}

const service = {
  live: true,
  runs: () => get("runs"),
  curves: (run) => get("curves", { run }),
  questions: (run, search) => get("questions", { run, ...searchValues(search) }),
  question: (run, step, group) => get("question", { run, step, group }),
  lines: (run, step, group) => get("lines", { run, step, group }),
};

const data = document.getElementById("embedded");

export const source = data ? embedded(JSON.parse(data.textContent)) : service;
