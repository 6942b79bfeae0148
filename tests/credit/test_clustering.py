"""Normalisation, NLI labels, equivalence rules and the greedy pass."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.nli_clustering import (
    entailment_index,
    greedy_clusters,
    label_indices,
    loose_equivalent,
    normalize_answer,
    strict_equivalent,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("a man, an apple, the sea", "man apple sea"),
        ("Athens", "athens"),
        ("東京 ÉCOLE", "東京 école"),
        ("The", ""),
    ],
)
def test_squad_normalisation(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("id2label", "indices"),
    [
        ({0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}, (2, 1, 0)),  # microsoft/deberta-*-mnli
        ({0: "contradiction", 1: "entailment", 2: "neutral"}, (1, 2, 0)),  # cross-encoder/nli-deberta-v3-*
        ({"0": "entailment", "1": "neutral", "2": "contradiction"}, (0, 1, 2)),  # MoritzLaurer/DeBERTa-v3-*, from JSON
    ],
)
def test_label_indices_of_the_model_families(id2label: dict[int, str], indices: tuple[int, int, int]) -> None:
    assert label_indices(id2label) == indices
    assert entailment_index(id2label) == indices[0]


def test_two_label_models_serve_the_strict_rule_only() -> None:
    id2label = {0: "not_entailment", 1: "entailment"}
    assert entailment_index(id2label) == 1
    with pytest.raises(SiopConfigError, match="neutral"):
        label_indices(id2label)


@pytest.mark.parametrize("id2label", [{0: "LABEL_0", 1: "LABEL_1"}, {0: "entailment", 1: "Entails"}, {}])
def test_a_model_without_one_entailment_label_is_refused(id2label: dict[int, str]) -> None:
    with pytest.raises(SiopConfigError, match="exactly one label that starts with 'entail'"):
        entailment_index(id2label)


def test_rules() -> None:
    entail, neutral, _ = labels = (1, 2, 0)
    strict = {(a, b) for a, b in itertools.product(labels, repeat=2) if strict_equivalent(a, b, entail)}
    loose = {(a, b) for a, b in itertools.product(labels, repeat=2) if loose_equivalent(a, b, labels)}
    assert strict == {(entail, entail)}
    assert loose == {(entail, entail), (entail, neutral), (neutral, entail)}


def test_identical_answers_are_equivalent_without_a_call() -> None:
    asked = []

    def equivalent(i: int, j: int) -> bool:
        asked.append((i, j))
        return False

    assert greedy_clusters(["Paris", "paris.", "Lyon", "the PARIS"], equivalent) == [0, 0, 1, 0]
    assert asked == [(0, 2)]


def test_answers_of_punctuation_alone_are_not_all_the_same() -> None:
    assert greedy_clusters(["+", "-", "The", "+"], lambda i, j: False) == [0, 1, 2, 0]


def test_membership_is_decided_by_the_opener_alone() -> None:
    chain = {(0, 1), (1, 2)}  # not transitive: the third is like the second, not like the first
    assert greedy_clusters(["x", "y", "z"], lambda i, j: (i, j) in chain) == [0, 0, 1]


@given(st.data(), st.integers(0, 8))
def test_greedy_pass_equals_its_definition(data: st.DataObject, size: int) -> None:
    answers = [data.draw(st.sampled_from(["one", "One", "two", "three", "four"])) for _ in range(size)]
    table = {pair: data.draw(st.booleans()) for pair in itertools.combinations(range(size), 2)}

    expected: list[int | None] = [None] * size
    for opener in range(size):
        if expected[opener] is None:
            cluster = 1 + max((c for c in expected if c is not None), default=-1)
            for other in range(opener, size):
                same = normalize_answer(answers[other]) == normalize_answer(answers[opener])
                if expected[other] is None and (same or table[opener, other]):
                    expected[other] = cluster
    assert greedy_clusters(answers, lambda i, j: table[i, j]) == expected
