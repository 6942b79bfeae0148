"""Two evaluations of the same questions under the same conditions: paired differences B - A."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from verl.trainer.siop.evaluation.manifest import Manifest, fields_of
from verl.trainer.siop.evaluation.questions import EvaluationError, Sample
from verl.trainer.siop.evaluation.statistics import bootstrap, finite, mcnemar
from verl.trainer.siop.evaluation.summary import SCORES, Estimate, by_question, scores_of

MISSING = "nothing"


@dataclass(frozen=True)
class Difference:
    """A score in both evaluations.

    Args:
        a, b: the means.
        change: b - a with its paired interval.
    """

    a: float
    b: float
    change: Estimate


@dataclass(frozen=True)
class Pairs:
    """Questions of one set, or of all, that both evaluations scored.

    Args:
        questions: how many.
        scores: em, f1, f1_release.
        only_a, only_b: questions on which EM is higher in A, in B.
        p: of the test that :attr:`Comparison.test` names, on these two.
    """

    questions: int
    scores: dict[str, Difference]
    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """Paired differences.

    Args:
        sets: by set.
        average: the unweighted average over the sets; its counts and p are those of all questions together.
        left_out: scored questions of A alone, of B alone.
        test: what p is of: McNemar's exact test, or the sign test where questions have several samples.
    """

    sets: dict[str, Pairs]
    average: Pairs
    left_out: tuple[int, int]
    test: str


def check_comparable(a: Manifest, b: Manifest, allow: Sequence[str] = ()) -> list[str]:
    """Refuse evaluations that differ in more than the model.

    Args:
        a, b: their manifests.
        allow: fields that may differ, as ``versions.torch``, or all of a section, as ``versions``.

    Returns:
        The fields that differ and may.

    Raises:
        EvaluationError: naming each field that differs with both values; or an allowed field that there is not.
    """
    left, right = fields_of(a), fields_of(b)
    names = sorted({*left, *right})

    def covers(field: str, name: str) -> bool:
        return name == field or name.startswith(f"{field}.")

    for field in allow:
        if not any(covers(field, name) for name in names):
            raise EvaluationError(f"--allow {field}: no such field; there are {', '.join(names)}")
    # Of a retriever that does not say what it serves nothing is known, so that it equals none.
    unequal = [
        name
        for name in names
        if not (name in left and name in right and left[name] == right[name])
        or (name == "retriever" and None in left[name])
    ]
    refused = [name for name in unequal if not any(covers(field, name) for field in allow)]
    if refused:
        lines = [f"  {name}: {_shown(left, name)} | {_shown(right, name)}" for name in refused]
        raise EvaluationError(
            "the evaluations were not made under the same conditions (A | B):\n"
            + "\n".join(lines)
            + f"\nevaluate again under the same ones, or, if it does not matter: --allow {' '.join(refused)}"
        )
    return unequal


def _shown(fields: dict[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else MISSING


def compare(a: Sequence[Sample], b: Sequence[Sample]) -> Comparison:
    """Pair the questions that both evaluations scored: those of one set, one id and one text.

    Raises:
        EvaluationError: there is none.
    """
    left, right = (
        {
            (*key, group[0].question): scores_of(group)
            for key, group in by_question(samples).items()
            if group[0].em is not None
        }
        for samples in (a, b)
    )
    several = any(sample.sample > 0 for sample in (*a, *b))
    sets: dict[str, list[np.ndarray]] = defaultdict(list)
    for key in sorted(left.keys() & right.keys()):
        sets[key[0]].append(np.array([left[key], right[key]]))
    if not sets:
        raise EvaluationError("no question was scored in both evaluations")
    pairs = {name: np.stack(rows) for name, rows in sets.items()}  # [N, 2, M]
    ends, average_ends = bootstrap({name: rows[:, 1] - rows[:, 0] for name, rows in pairs.items()})
    means = {name: rows.mean(axis=0) for name, rows in pairs.items()}  # [2, M]
    everything = np.concatenate(list(pairs.values()))
    return Comparison(
        sets={name: _pairs(rows, means[name], ends[name]) for name, rows in pairs.items()},
        average=_pairs(everything, np.mean(list(means.values()), axis=0), average_ends),
        left_out=(len(left.keys() - right.keys()), len(right.keys() - left.keys())),
        test="sign test on the means of questions" if several else "McNemar's exact test",
    )


def _pairs(rows_N2M: np.ndarray, means_2M: np.ndarray, ends_2M: np.ndarray) -> Pairs:
    em = SCORES.index("em")
    only_a = int((rows_N2M[:, 0, em] > rows_N2M[:, 1, em]).sum())
    only_b = int((rows_N2M[:, 1, em] > rows_N2M[:, 0, em]).sum())
    scores = {
        name: Difference(
            a=float(means_2M[0, i]),
            b=float(means_2M[1, i]),
            change=Estimate(
                value=float(means_2M[1, i] - means_2M[0, i]), low=finite(ends_2M[0, i]), high=finite(ends_2M[1, i])
            ),
        )
        for i, name in enumerate(SCORES)
    }
    return Pairs(questions=len(rows_N2M), scores=scores, only_a=only_a, only_b=only_b, p=mcnemar(only_a, only_b))
