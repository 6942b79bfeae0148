"""What ``eval_siop.sh`` left, as tables; ``docs/evaluation.md`` says what they mean.

python -m verl.trainer.siop.report DIR                           the results
python -m verl.trainer.siop.report compare A B [--allow FIELD …] paired differences B - A
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from verl.trainer.siop.evaluation.compare import check_comparable, compare
from verl.trainer.siop.evaluation.manifest import read_evaluation
from verl.trainer.siop.evaluation.questions import EvaluationError
from verl.trainer.siop.evaluation.tables import (
    AVERAGE,
    comparison_table,
    evaluation_table,
    number,
    printable,
    table,
)

__all__ = ["METRICS_FILE", "core_metrics", "number", "read_metrics", "rows", "table"]

# val-core/<data source>/<metric>/mean@<samples per question>
_MEAN = re.compile(
    r"val-(?:core|aux)/(?P<source>.+)/(?P<metric>em|f1|success|completion|oracle_rate|invalid)/(?P<mean>mean@\d+)$"
)
METRICS_FILE = "metrics.json"


def core_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """EM and F1 of a validation as ``val-core/<data source>/em/mean@n``, and averaged over the data sources; of games
    success, completion, the oracle's rate and the share of invalid turns.

    verl puts every variable but the score into ``val-aux``. The average ``val-core/average/em/mean@n`` counts each data
    source once, however many questions it has.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in metrics.items():
        match = _MEAN.match(key)
        if match:
            found.setdefault((match["metric"], match["mean"]), {})[match["source"]] = value
    core = {}
    for (metric, mean), by_source in found.items():
        for source, value in [*by_source.items(), (AVERAGE, math.fsum(by_source.values()) / len(by_source))]:
            core[f"val-core/{source}/{metric}/{mean}"] = value
    return core


def read_metrics(folder: Path) -> dict[str, float]:
    """Metrics that the trainer wrote beside the evaluated rollouts.

    Raises:
        FileNotFoundError: there was no evaluation, or it did not finish.
    """
    return json.loads((folder / METRICS_FILE).read_text())


def rows(metrics: dict[str, float]) -> list[tuple[str, float | None, float | None]]:
    """(data source, EM, F1) of each source, the average last, in [0, 1]; None where the data has no labels."""
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        match = _MEAN.match(key)
        if match:
            found.setdefault(match["source"], {})[match["metric"]] = value
    in_order = sorted(found.items(), key=lambda item: (item[0] == AVERAGE, item[0]))
    return [(source, values.get("em"), values.get("f1")) for source, values in in_order]


def report(folder: Path) -> str:
    """The tables of an evaluation, and means over all its samples.

    Raises:
        EvaluationError: the folder holds no finished evaluation.
    """
    manifest, samples = read_evaluation(folder)
    turns, tokens = (fmean(getattr(sample, name) for sample in samples) for name in ("turns", "response_tokens"))
    return f"{evaluation_table(manifest)}\nmean turns {number(turns, 2)}, mean response tokens {number(tokens, 1)}"


def report_comparison(a: Path, b: Path, allow: Sequence[str]) -> str:
    """The tables of paired differences, after a line about each evaluation and what differs between them.

    Raises:
        EvaluationError: a folder holds no finished evaluation, or they were not made under the same conditions.
    """
    (left, samples_a), (right, samples_b) = read_evaluation(a), read_evaluation(b)
    differing = check_comparable(left, right, allow)
    return "\n".join(
        [
            *(f"{name}: {printable(one.model['checkpoint'])}" for name, one in (("A", left), ("B", right))),
            *([f"differing, as allowed: {printable(', '.join(differing))}"] if differing else []),
            "",
            comparison_table(compare(samples_a, samples_b)),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    compares = words[:1] == ["compare"]
    parser = argparse.ArgumentParser(
        prog="python -m verl.trainer.siop.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if compares:
        parser.add_argument("command", help=argparse.SUPPRESS)
        parser.add_argument("a", type=Path, metavar="A", help="folder of an evaluation")
        parser.add_argument("b", type=Path, metavar="B", help="folder of another one of the same questions")
        allowed = "fields of manifest.json that may differ, as versions.torch, or sections, as versions"
        parser.add_argument("--allow", nargs="+", action="extend", default=[], metavar="FIELD", help=allowed)
    else:
        parser.add_argument("folder", type=Path, help="OUTPUT_DIR of eval_siop.sh, or the folder validation in it")
    options = parser.parse_args(words)
    try:
        text = report_comparison(options.a, options.b, options.allow) if compares else report(options.folder)
    except EvaluationError as error:
        sys.stderr.write("\n".join(printable(line) for line in f"error: {error}".split("\n")) + "\n")
        return 1
    sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
