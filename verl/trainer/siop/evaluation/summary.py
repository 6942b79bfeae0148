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
        outcomes: of games, by the names of :attr:`Sample.outcomes`: means over the samples of a board, then over
            boards.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int
    samples: int
    labelled: int
    scores: dict[str, Estimate]
    unreachable: float | None
    means: dict[str, float | None]
    outcomes: dict[str, Estimate] = {}


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
    scores, average_scores = _estimates(values, names)
    outcomes, average_outcomes = _estimates(*_outcomes(sets))
    found = {
        data_source: _summary(
            groups,
            labelled=len(values.get(data_source, ())),
            scores=scores.get(data_source, {}),
            outcomes=outcomes.get(data_source, {}),
        )
        for data_source, groups in sets.items()
    }
    return found, _average(found, average_scores, average_outcomes)


def _outcomes(sets: Mapping[str, Sequence[Group]]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Of the sets with outcomes: set -> the means of each question [N, M]; and the M names, which all of them have."""
    games = {name: groups for name, groups in sets.items() if all(s.outcomes for group in groups for s in group)}
    samples = [sample for groups in games.values() for group in groups for sample in group]
    names = [name for name in (samples[0].outcomes if samples else ()) if all(name in s.outcomes for s in samples)]
    return {
        data_source: np.array([[fmean(s.outcomes[name] for s in group) for name in names] for group in groups])
        for data_source, groups in games.items()
    }, names


def _estimates(
    values: dict[str, np.ndarray], names: Sequence[str]
) -> tuple[dict[str, dict[str, Estimate]], dict[str, Estimate]]:
    """Means with their intervals by set, and their unweighted average; of [N, M] values of each set's questions."""
    if not values:
        return {}, {}
    ends, average_ends = bootstrap(values)

    def estimates(means: np.ndarray, found: np.ndarray) -> dict[str, Estimate]:
        return {
            name: Estimate(value=float(mean), low=finite(low), high=finite(high))
            for name, mean, low, high in zip(names, means, *found, strict=True)
        }

    means = {data_source: values_NM.mean(axis=0) for data_source, values_NM in values.items()}
    by_set = {data_source: estimates(means[data_source], ends[data_source]) for data_source in values}
    return by_set, estimates(np.mean(list(means.values()), axis=0), average_ends)


def _summary(
    groups: Sequence[Group], labelled: int, scores: dict[str, Estimate], outcomes: dict[str, Estimate]
) -> Summary:
    samples = [sample for group in groups for sample in group]
    reachable = [group[0].reachable for group in groups]
    return Summary(
        questions=len(groups),
        samples=len(samples),
        labelled=labelled,
        scores=scores,
        unreachable=_mean([None if value is None else not value for value in reachable]),
        means={name: _mean([getattr(sample, name) for sample in samples]) for name in COUNTS},
        outcomes=outcomes,
    )


def _average(sets: Mapping[str, Summary], scores: dict[str, Estimate], outcomes: dict[str, Estimate]) -> Summary:
    return Summary(
        questions=sum(summary.questions for summary in sets.values()),
        samples=sum(summary.samples for summary in sets.values()),
        labelled=sum(summary.labelled for summary in sets.values()),
        scores=scores,
        unreachable=_mean([summary.unreachable for summary in sets.values()]),
        means={name: _mean([summary.means[name] for summary in sets.values()]) for name in COUNTS},
        outcomes=outcomes,
    )


def _mean(values: Sequence[float | bool | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return fmean(known) if known else None
