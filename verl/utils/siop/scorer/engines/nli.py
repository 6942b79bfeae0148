"""Natural-language inference for the scorer: clusters of answers and entailment of answers by evidence.

Two backends: :class:`LexicalNli`, which needs no model and compares words, and :class:`nli_model.TransformersNli`. No
torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from verl.utils.siop.nli_clustering import identity_key, mentions, words


@dataclass(frozen=True)
class AnswerGroup:
    """Answers to one question, to be clustered by meaning."""

    question: str
    answers: Sequence[str]
    strict: bool = True


class NliBackend(Protocol):
    """Entailment and clusters.

    Attributes:
        name: the model, for messages and ``/health``.
        asked: ordered pairs of texts that have been asked for so far.
        computed: those of them that went through a model.
    """

    name: str
    asked: int
    computed: int

    def cluster(self, groups: Sequence[AnswerGroup]) -> list[list[int]]:
        """Cluster ids of each group's answers: those of :func:`nli_clustering.greedy_clusters`."""
        ...

    def entailment(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """P(premise entails hypothesis) of each (premise, hypothesis)."""
        ...


# (group, i, j): does answer j of the group mean the same as answer i, which opened a cluster?
Question = tuple[int, int, int]


def cluster_in_rounds(
    groups: Sequence[Sequence[str]], equivalent: Callable[[list[Question]], list[bool]]
) -> list[list[int]]:
    """Greedy clusters of many groups at once, with few, large calls.

    In each round every unfinished group opens one cluster and asks about all its unassigned answers; the questions of
    all groups go into one call. The ids are those of :func:`nli_clustering.greedy_clusters` group by group: whether an
    answer joins a cluster depends on the answer that opened it alone.

    Args:
        groups: answers of each group.
        equivalent: answers a list of questions; never asked about answers that are identical once normalised.

    Returns:
        Cluster ids of each group's answers, 0, 1, … in order of opening.
    """
    keys = [[identity_key(answer) for answer in answers] for answers in groups]
    ids = [[-1] * len(answers) for answers in groups]
    opened = 0
    while any(-1 in group_ids for group_ids in ids):
        questions: list[Question] = []
        for g, group_ids in enumerate(ids):
            i = group_ids.index(-1) if -1 in group_ids else len(group_ids)
            for j in range(i, len(group_ids)):
                if group_ids[j] == -1 and keys[g][j] == keys[g][i]:
                    group_ids[j] = opened
                elif group_ids[j] == -1:
                    questions.append((g, i, j))
        for (g, _, j), same in zip(questions, equivalent(questions) if questions else [], strict=True):
            if same:
                ids[g][j] = opened
        opened += 1
    return ids


class LexicalNli:
    """Words instead of a model: the same text (:func:`nli_clustering.plain_form`) is one cluster; a premise entails a
    hypothesis (1.0, else 0.0) if it contains the hypothesis' words as one run of whole words of the plain form.

    It knows no meaning. Other words for the same are another cluster; a hypothesis that is a sentence is entailed by
    that sentence alone; and a premise entails what it merely mentions, or denies. A hypothesis of punctuation and
    articles is never entailed.
    """

    name = "lexical"
    asked = 0
    computed = 0

    def cluster(self, groups: Sequence[AnswerGroup]) -> list[list[int]]:
        """See :class:`NliBackend`."""
        return cluster_in_rounds([group.answers for group in groups], lambda questions: [False] * len(questions))

    def entailment(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See :class:`NliBackend`."""
        return [float(mentions(words(premise), hypothesis)) for premise, hypothesis in pairs]
