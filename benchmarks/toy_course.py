"""How the signal of a method changes while it trains, from the rollouts that finished runs of the toy worlds dumped.

    python benchmarks/toy_course.py runs/toy_table/stale/siop-seed1 runs/toy_table/stale/empo-seed1 [--window 10]

For windows of steps: EM and turns of the training rollouts; the target's mass on right answers (mean over questions of
the sum of q over rollouts' clusters that are right), how often the heaviest cluster is right; and the turn AUC, with
which the turn advantages tell searches that return the next needed fact from others at the same turn index. What a
method does not have is left blank. A method whose vote or whose AUC is good at the start may lose both on the way.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from omegaconf import DictConfig  # noqa: E402
from verl.utils.siop.turn_utils import parse_answer  # noqa: E402

from benchmarks.toy_results import (  # noqa: E402
    Dumped,
    Turn,
    config_of,
    needed_fact_found,
    observations_of,
    question_of,
    turn_auc,
)
from benchmarks.toy_table import METHODS, WORLDS  # noqa: E402


def votes(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Of the rollouts of one question: the target's mass on right answers, and whether the heaviest cluster is right;
    of several the first counts, as ``siop/heaviest_cluster_right`` of the trainer; 0 and 0 without clusters.

    Args:
        rows: dumped rollouts with ``cluster``, ``target`` and ``em``.
    """
    clusters: dict[int, tuple[float, float]] = {}
    for row in rows:
        if row.get("cluster") is not None:
            clusters.setdefault(row["cluster"], (row["target"], row["em"]))
    if not clusters:
        return 0.0, 0.0
    total = sum(target for target, _ in clusters.values())
    mass = sum(target for target, em in clusters.values() if em) / total if total else 0.0
    return mass, max(clusters.values(), key=lambda cluster: cluster[0])[1]


def course(folder: Path, toy: Path, algorithm: DictConfig, window: int) -> list[dict[str, float]]:
    """For each window of steps ``steps`` (its last), ``em``, ``turns``, ``mass``, ``heaviest`` and ``auc``; nan is what
    the method does not have."""
    files = sorted(folder.glob("[0-9]*.jsonl"), key=lambda file: int(file.stem))
    found = []
    for start in range(0, len(files), window):
        part = files[start : start + window]
        ems, counts, groups, turns, clustered = [], [], [], [], False
        for file in part:
            step = Dumped.read(file)
            by_question: dict[str, list[Mapping[str, Any]]] = {}
            for number, values in enumerate(step.advantages(algorithm)):
                row, texts, uid = step.rows[number], step.texts[number], f"{file.stem}-{step.uids[number]}"
                by_question.setdefault(uid, []).append(row)
                observations = observations_of(row["output"])[: len(texts) - 1]
                if len(texts) != len(values) or len(observations) != len(texts) - 1:
                    continue  # a result that the policy made up inside a turn
                labels = needed_fact_found(question_of(row["input"], toy), observations, parse_answer(texts[-1]))
                turns += [
                    Turn(uid, index, index < len(values) - 1, value, label)
                    for index, (value, label) in enumerate(zip(values, labels, strict=True))
                ]
            ems += [row["em"] for row in step.rows]
            counts += step.counts
            groups += [votes(group) for group in by_question.values()]
            clustered |= any(row.get("cluster") is not None for row in step.rows)
        found.append(
            {
                "steps": float(part[-1].stem),
                "em": sum(ems) / len(ems),
                "turns": sum(counts) / len(counts),
                "mass": sum(mass for mass, _ in groups) / len(groups) if clustered else math.nan,
                "heaviest": sum(right for _, right in groups) / len(groups) if clustered else math.nan,
                "auc": turn_auc(turns)["same_index"],
            }
        )
    return found


def _cell(value: float, width: int) -> str:
    return " " * width if math.isnan(value) else f"{value:{width}.3f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders WORLD/METHOD-seedN of toy_table.py")
    parser.add_argument("--window", type=int, default=10, help="steps of a row (default: 10)")
    args = parser.parse_args(argv)
    if args.window < 1:
        parser.error(f"--window must be at least 1, got {args.window}")
    for folder in args.runs:
        world, name = ("", *folder.resolve().parts)[-2:]
        method = re.fullmatch(r"([\w-]+)-seed\d+", name)
        if world not in WORLDS or not method or method[1] not in METHODS:
            parser.error(
                f"{folder}: not WORLD/METHOD-seedN with a world of {', '.join(WORLDS)} and a method of "
                f"{', '.join(METHODS)}"
            )
        if not any((folder / "rollouts").glob("[0-9]*.jsonl")):
            print(f"error: no rollouts in {folder / 'rollouts'}", file=sys.stderr)
            return 2
        algorithm = config_of(METHODS[method[1]]).algorithm
        rows = course(folder / "rollouts", WORLDS[world].toy, algorithm, args.window)
        print(f"\n{world}/{name}\n{'steps':>6}{'EM':>8}{'turns':>8}{'mass':>8}{'heaviest':>10}{'turn AUC':>10}")
        for row in rows:
            print(
                f"{row['steps']:6.0f}{row['em']:8.3f}{row['turns']:8.2f}{_cell(row['mass'], 8)}"
                f"{_cell(row['heaviest'], 10)}{_cell(row['auc'], 10)}".rstrip()
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
