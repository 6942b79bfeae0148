"""``python -m examples.toy_world.report``: held-out results before and after training, overall and by template."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from verl.trainer.siop.report import number, read_metrics, table


def _template_of(data: Path) -> Callable[[str], str]:
    """Finds the template of a rendered prompt by the question in it."""
    templates = {row["question"]: row["template"] for row in pq.read_table(data)["extra_info"].to_pylist()}

    def find(prompt: str) -> str:
        for question, template in templates.items():
            if question in prompt:
                return template
        raise KeyError(f"no question of {data} is in the prompt {prompt!r}")

    return find


def _read(folder: Path, data: Path) -> dict[str, dict[str, list[float]]]:
    """EM and F1 of every rollout, by template."""
    template_of = _template_of(data)
    scores: dict[str, dict[str, list[float]]] = {}
    for file in sorted(folder.glob("[0-9]*.jsonl")):
        # Not splitlines, which also ends a line where a text has a line separator of Unicode.
        for row in (json.loads(line) for line in file.read_text().split("\n") if line):
            entry = scores.setdefault(template_of(row["input"]), {"em": [], "f1": []})
            entry["em"].append(row["em"])
            entry["f1"].append(row["f1"])
    return scores


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the evaluated parquet file")
    parser.add_argument("--before", type=Path, required=True, help="validation folder of the model before training")
    parser.add_argument("--after", type=Path, required=True, help="validation folder of the trained model")
    parser.add_argument("--title", default="held-out questions")
    args = parser.parse_args()

    before, after = _read(args.before, args.data), _read(args.after, args.data)
    body = []
    for metric, label in (("em", "EM"), ("f1", "F1")):
        pair = [_mean([x for entry in side.values() for x in entry[metric]]) for side in (before, after)]
        body.append([f"held-out {label}", *map(number, pair)])
    old, new = read_metrics(args.before), read_metrics(args.after)
    for name, label in (("turns", "mean turns"), ("response_tokens", "mean response tokens")):
        body.append([label, *(number(side[f"val-aux/{name}/mean"], 2) for side in (old, new))])
    for template in sorted(before):
        body.append([f"EM {template}", number(_mean(before[template]["em"])), number(_mean(after[template]["em"]))])
    print(table([args.title, "before", "after"], body))


if __name__ == "__main__":
    main()
