"""What the samples of an evaluation say about each set, and about the sets together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np
from pydantic import BaseModel, ConfigDict
from verl.trainer.siop.evaluation.questions import Sample
from verl.trainer.siop.evaluation.statistics import bootstrap, finite

SCORES = ("em", "f1", "f1_release")
# Of every sample; None where it is not known.
COUNTS = ("no_answer", "truncated", "turn_limit", "searches", "failed_searches", "turns", "response_tokens")

Group = Sequence[Sample]


class Estimate(BaseModel):
    """A mean over questions and its 95 % interval; no interval where the questions do not differ."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float | None
    high: float | None


class Summary(BaseModel):
    """Results of one set, or the unweighted average over the sets.

    Attributes:
        questions: how many there are.
        samples: of them.
        labelled: questions with a gold answer, over which the scores are.
        scores: em, f1, f1_release: means over the samples of a question, then over the questions; pass: share of
            questions of which a sample has EM 1, only with several samples. Empty without a gold answer.
        unreachable: share of the questions that no short answer can match; None where the data does not say.
        means: over the samples: see :class:`Sample`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int
    samples: int
    labelled: int
    scores: dict[str, Estimate]
    unreachable: float | None
    means: dict[str, float | None]


def by_question(samples: Iterable[Sample]) -> dict[tuple[str, str], list[Sample]]:
    """(set, id) -> the samples of that question."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.key].append(sample)
    return dict(groups)


def scores_of(group: Group) -> list[float]:
    """The means of :data:`SCORES` over the samples of a question that has a gold answer."""
    return [fmean(getattr(sample, name) for sample in group) for name in SCORES]


def summarise(samples: Sequence[Sample]) -> tuple[dict[str, Summary], Summary]:
    """Results by set, and their average.

    A question counts once, however many samples it has; of a mean that is not known for all, those that are known
    count. The average leaves out sets without the value.
    """
    sets: dict[str, list[Group]] = defaultdict(list)
    for (data_source, _), group in sorted(by_question(samples).items()):
        sets[data_source].append(group)
    several = any(len(group) > 1 for groups in sets.values() for group in groups)
    names = [*SCORES, *(["pass"] if several else [])]
    values = {}
    for data_source, groups in sets.items():
        labelled = [group for group in groups if group[0].em is not None]
        if labelled:
            rows = [[*scores_of(group), float(any(s.em == 1 for s in group))][: len(names)] for group in labelled]
            values[data_source] = np.array(rows)
    ends, average_ends = bootstrap(values)

    def estimates(means: np.ndarray, found: np.ndarray) -> dict[str, Estimate]:
        return {
            name: Estimate(value=float(mean), low=finite(low), high=finite(high))
            for name, mean, low, high in zip(names, means, *found, strict=True)
        }

    found = {
        data_source: _summary(
            groups,
            labelled=len(values.get(data_source, ())),
            scores=estimates(values[data_source].mean(axis=0), ends[data_source]) if data_source in values else {},
        )
        for data_source, groups in sets.items()
    }
    means = [values_NM.mean(axis=0) for values_NM in values.values()]
    return found, _average(found, estimates(np.mean(means, axis=0), average_ends) if means else {})


def _summary(groups: Sequence[Group], labelled: int, scores: dict[str, Estimate]) -> Summary:
    samples = [sample for group in groups for sample in group]
    reachable = [group[0].reachable for group in groups]
    return Summary(
        questions=len(groups),
        samples=len(samples),
        labelled=labelled,
        scores=scores,
        unreachable=_mean([None if value is None else not value for value in reachable]),
        means={name: _mean([getattr(sample, name) for sample in samples]) for name in COUNTS},
    )


def _average(sets: Mapping[str, Summary], scores: dict[str, Estimate]) -> Summary:
    return Summary(
        questions=sum(summary.questions for summary in sets.values()),
        samples=sum(summary.samples for summary in sets.values()),
        labelled=sum(summary.labelled for summary in sets.values()),
        scores=scores,
        unreachable=_mean([summary.unreachable for summary in sets.values()]),
        means={name: _mean([summary.means[name] for summary in sets.values()]) for name in COUNTS},
    )


def _mean(values: Sequence[float | bool | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known else None
