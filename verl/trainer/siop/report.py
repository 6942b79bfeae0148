"""``python -m verl.trainer.siop.report DIR``: the table of an evaluation that ``eval_siop.sh`` left in DIR."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# val-core/<data source>/<metric>/mean@<samples per question>
_MEAN = re.compile(r"val-(?:core|aux)/(?P<source>.+)/(?P<metric>em|f1)/(?P<mean>mean@\d+)$")
METRICS_FILE = "metrics.json"
AVERAGE = "average"


def core_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """EM and F1 of a validation as ``val-core/<data source>/em/mean@n``, and averaged over the data sources.

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


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns padded to their width, the first to the left, the others to the right."""
    lines = [list(header), *map(list, body)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the metrics of an evaluation.")
    parser.add_argument("folder", type=Path, help="folder with metrics.json (trainer.validation_data_dir)")
    metrics = read_metrics(parser.parse_args().folder)
    turns, tokens = (metrics.get(f"val-aux/{name}/mean") for name in ("turns", "response_tokens"))
    body = [[source, number(em), number(f1)] for source, em, f1 in rows(metrics)]
    sys.stdout.write(table(["data source", "EM", "F1"], body) + "\n")
    sys.stdout.write(f"mean turns {number(turns, 2)}, mean response tokens {number(tokens, 1)}\n")


if __name__ == "__main__":
    main()
