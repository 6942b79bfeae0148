"""Clusters of answers by meaning: normalisation, NLI label look-up, equivalence rules and the greedy pass.

Pure functions; the NLI model that predicts the labels lives behind the scorer.
Source of the greedy pass and of the rules: semantic entropy (Kuhn et al., arXiv 2302.09664).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence

from verl.utils.siop.errors import SiopConfigError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Normal form of an answer: lower case, no ASCII punctuation, no articles, single spaces (SQuAD v1.1 evaluation).

    >>> normalize_answer("  The Eiffel-Tower! ")
    'eiffeltower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _label_index(id2label: Mapping[int, str], stem: str) -> int:
    matches = [int(index) for index, label in id2label.items() if str(label).lower().startswith(stem)]
    if len(matches) != 1:
        raise SiopConfigError(
            f"the NLI model's id2label must have exactly one label that starts with '{stem}' (any case), "
            f"it has {len(matches)}: {dict(id2label)}"
        )
    return matches[0]


def entailment_index(id2label: Mapping[int, str]) -> int:
    """Index of the entailment label of an NLI model.

    Args:
        id2label: the model's ``config.id2label``; keys may be strings, as in JSON.

    Raises:
        SiopConfigError: not exactly one label starts with ``entail`` (any case).
    """
    return _label_index(id2label, "entail")


def label_indices(id2label: Mapping[int, str]) -> tuple[int, int, int]:
    """Indices of (entailment, neutral, contradiction), for the loose rule.

    Raises:
        SiopConfigError: a label is missing or ambiguous, as in models with two labels.
    """
    return entailment_index(id2label), _label_index(id2label, "neutral"), _label_index(id2label, "contradict")


def strict_equivalent(forward: int, backward: int, entailment: int) -> bool:
    """Equivalent if each answer entails the other.

    Args:
        forward, backward: index of the most probable label for (a, b) and for (b, a).
        entailment: index of the entailment label.
    """
    return forward == entailment and backward == entailment


def loose_equivalent(forward: int, backward: int, labels: tuple[int, int, int]) -> bool:
    """Equivalent if neither direction contradicts and not both are neutral.

    Args:
        forward, backward: index of the most probable label for (a, b) and for (b, a).
        labels: the indices of (entailment, neutral, contradiction), see :func:`label_indices`.
    """
    _, neutral, contradiction = labels
    return contradiction not in (forward, backward) and not forward == backward == neutral


def identity_key(answer: str) -> str:
    """What answers share that are equivalent without asking a model: the normalised text.

    An answer of articles and punctuation alone normalises to nothing, which would make all such answers identical; it
    stands for itself.
    """
    return normalize_answer(answer) or answer.strip()


def greedy_clusters(answers: Sequence[str], equivalent: Callable[[int, int], bool]) -> list[int]:
    """Cluster answers greedily in their order: an unassigned answer opens a cluster and takes its later equivalents.

    Args:
        answers: K answers in rollout order.
        equivalent: ``equivalent(i, j)`` for the answer ``i`` that opened the cluster and a later one ``j``. It is not
            asked about answers that are identical once normalised: those are equivalent.

    Returns:
        K cluster ids, 0, 1, … in the order in which the clusters were opened.

    >>> greedy_clusters(["Paris", "Lyon", "paris."], lambda i, j: False)
    [0, 1, 0]
    """
    keys = [identity_key(answer) for answer in answers]
    clusters: list[int | None] = [None] * len(answers)
    opened = 0
    for i, key in enumerate(keys):
        if clusters[i] is not None:
            continue
        clusters[i] = opened
        for j in range(i + 1, len(answers)):
            if clusters[j] is None and (keys[j] == key or equivalent(i, j)):
                clusters[j] = opened
        opened += 1
    return [cluster for cluster in clusters if cluster is not None]
