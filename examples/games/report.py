"""``python -m examples.games.report``: held-out results of a game before and after training, beside oracle play."""

from __future__ import annotations

import argparse
from pathlib import Path

from verl.trainer.siop.evaluation.manifest import read_evaluation
from verl.trainer.siop.report import number, table

_CEILING = "ceiling_"
_COUNTS = (("turns", "mean turns"), ("response_tokens", "mean response tokens"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="validation folder of the model before training")
    parser.add_argument("--after", type=Path, required=True, help="validation folder of the trained model")
    parser.add_argument("--title", default="held-out boards")
    args = parser.parse_args()
    (before, _), (after, _) = read_evaluation(args.before), read_evaluation(args.after)
    body = []
    for source in before.sets:
        old, new = before.sets[source].outcomes, after.sets[source].outcomes
        for name in old:
            if not name.startswith(_CEILING):
                ceiling = new.get(_CEILING + name)
                values = [number(side[name].value) for side in (old, new)]
                label = f"{source} {name.replace('_', ' ')}"
                body.append([label, *values, number(ceiling.value if ceiling else None)])
    for name, label in _COUNTS:
        body.append([label, *(number(side.average.means[name], 2) for side in (before, after)), "-"])
    print(table([args.title, "before", "after", "oracle play"], body))


if __name__ == "__main__":
    main()
