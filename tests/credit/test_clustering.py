"""Normalisation, NLI labels, equivalence rules and the greedy pass."""

from __future__ import annotations

import html
import itertools
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.nli_clustering import (
    entailment_index,
    greedy_clusters,
    identity_key,
    label_indices,
    loose_equivalent,
    normalize_answer,
    plain_form,
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
    assert greedy_clusters([",", ";", '"', "'", ","], lambda i, j: False) == [0, 1, 2, 3, 0]


SAME = [
    ("Paris", "the PARIS."),
    ("Paris", "Paris!"),
    ("Paris", "\u200bParis\ufeff"),
    ("Paris, France", "Paris , France."),
    ("July 4, 1776", "july 4 1776"),
    ("Panic! at the Disco", "Panic at the Disco"),
    ("3.5", "3.5."),
    # HTML entities.
    ("AT&T", "AT&amp;T"),
    ("Emma", "&quot;Emma&quot;"),
    ("D'Arc", "D&#39;Arc"),
    ("D'Arc", "D&#x2019;Arc"),
    ("New York", "New&nbsp;York"),
    # Quotes.
    *(
        ("Emma", f"{a}Emma{b}")
        for a, b in ('""', "''", "“”", "„“", "‘’", "«»", "‹›", "「」", ("``", "''"), ("''", "''"))
    ),
    *(("1984", f"{a}1984{b}") for a, b in ('""', "''", "“”", "‘’", "«»")),
    ("Emma", "\"'Emma'\""),
    ("Emma", "'\"Emma\"'"),
    ("1984", "\"'1984'\""),
    ("1984", "'\"1984\"'"),
    ("Emma", '"Emma'),
    ("Emma", "“Emma.”"),
    ("Levi's", "Levi’s"),
    ("rock 'n' roll", "rock ’n’ roll"),
    ("Hawai'i", "Hawaiʻi"),
    # Unicode forms, dashes, width.
    ("Zürich", "Zu\u0308rich"),
    ("\u1e69", "s\u0307\u0323"),
    ("Å", "\u212b"),
    ("Straße", "STRASSE"),
    ("-5", "−5"),
    ("1990-1995", "1990–1995"),
    ("C++", "Ｃ＋＋"),
    ("バ", "ﾊﾞ"),
    ("fin", "\ufb01n"),
    ("-5", "\ufe635"),
    ("-5", "\u207b5"),
    # What changes nothing but how a character is drawn.
    ("❤", "❤\ufe0f"),
    ("5", "\u061c5"),
    ("ᠠ", "ᠠ\u180b"),
    # Half a pair, an ellipsis, an article.
    ("Emma", 'Emma"'),
    ("Emma", 'Emma."'),
    ("Emma", '" Emma "'),
    ("Emma", "Emma…"),
    ("0.333...", "0.333…"),
    ("apple", "An apple"),
    ("a dog", "A dog"),
    ("x' y'", "\"x' y'\""),
    ("Emma", "''Emma''."),
    ('5"', "5''"),
    ("tower", 'the "the tower"'),
    ("<x", "&amp;lt;x"),
    # The comma of a date, and one that stands alone.
    ("May 5, 2020", "May 5 2020"),
    ("Jan. 5, 2020", "jan 5 , 2020"),
    ("3, 5", "3 , 5"),
    # Case, where it is no unit's.
    ("5 PM", "5 pm"),
    ("5 May 2020", "5 MAY 2020"),
    ("H2O", "h2o"),
    ("3D", "3d"),
    ("5 a.m.", "5 A.M."),
    ("5 mW", "5  mW."),
    ("The Beatles", "beatles"),
    *((text, text.upper()) for text in ("no", "yes", "ok", "us")),
    # The end of a sentence in other scripts.
    ("भारत", "भारत।"),
    ("الرياض", "الرياض؟"),
    ("الرياض", "الرياض،"),
    ("الرياض السعودية", "الرياض ، السعودية۔"),
]
# The first is the SQuAD normal form's own, the rest is its kind.
DIFFERENT = [
    ("-5", "5"), ("−5", "5"), ("+5", "5"), ("±5", "5"), ("~5", "5"), ("<5", ">5"), ("5-", "5"), ("5e-3", "5e3"),
    ("3.5", "35"), ("3,5", "35"), (".5", "5"), ("0.5", "05"), ("1.000", "1000"), ("3 . 5", "3 5"),
    ("C++", "C#"), ("C++", "C"), ("C#", "C"), ("F#", "F"), ("A+", "A"), ("A+", "A-"), ("A*", "A"), (".NET", "NET"),
    ("5%", "5"), ("$5", "5"), ("$5", "€5"), ("#1", "1"), ("5°", "5"), ("5'", '5"'), ("5'", "5"), ("5'10\"", "510"),
    ("1/2", "12"), ("1:2", "12"), ("1-2", "12"), ("2^3", "23"), ("10²", "102"), ("½", "12"), ("x₂", "x"),
    ("5!", "5"), ("n!", "n"), ("(n+1)!", "(n+1)"), ("e4!", "e4?"), ("f(x)", "fx"), ("(0, 1)", "[0, 1]"),
    ("AT&T", "ATT"), ("R&D", "RD"), ("it's", "its"), ("a_b", "ab"), ("M*A*S*H", "MASH"), ("@x", "x"),
    ("vitamin A", "vitamin"), ("Zürich", "Zurich"), ("+", "-"), ("?", "!"), ("The", "A"),
    # Letters that look like an article.
    ("A, C", "C"), ("A. C", "C"), ("A; C", "C"), ("A C", "C"), ("a, b", "b"), ("A: Paris", "Paris"),
    ("A and B", "and B"), ("a - b", "- b"), ("A negative", "negative"), ("The, x", "x"), ("the - 5", "- 5"),
    # Primes, complements, feet and inches; decimals that go on.
    ("(A ∪ B)'", "(A ∪ B)"), ("(f+g)'", "(f+g)"), ("[A]'", "[A]"), ("y''", "y"), ("f'''", "f''"),
    ("A\u0304'", "A\u0304"), ("(f)' and (g)'", "(f) and (g)"), ("f''' - g'''", "f'' - g''"),
    ("5½\"", "5½"), ("60°'", "60°"), ("5 '", "5"), ("5 \" x 6 \"", "5 x 6"), ("10\u207b5", "10-5"),
    ("(f)'(g)'", "(f)(g)"), ("0.333...", "0.333"), ("0.999…", "0.999"),
    ("cos''(x)", "cos(x)"), ('cos"(x)', "cos(x)"), ("sin''", "sin"), ("sin'''", "sin''"), ("AB''", "AB"),
    # Punctuation between numbers.
    ("1, 1/2", "1 1/2"), ("1, ½", "1 ½"), ("3, -2", "3 -2"), ("3, .5", "3 .5"), ("1; 2", "1 2"), ("٣، ٥", "٣ ٥"),
    ("3 , 5", "3 5"), *itertools.combinations(("3: 5", "3, 5", "3. 5", "3; 5", "3 5"), 2),
    # Units.
    ("5 mW", "5 MW"), ("5mW", "5MW"), ("3.5 mHz", "3.5 MHz"), ("8 Gb", "8 GB"), ("5 m", "5 M"), ("5 mW/m", "5 MW/m"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_only_looks_different_is_one_cluster(one: str, other: str) -> None:
    assert greedy_clusters([one, other, "x"], lambda i, j: False) == [0, 0, 1]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_signs_points_and_symbols_never_merge_before_a_model_is_asked(one: str, other: str) -> None:
    assert greedy_clusters([one, other], lambda i, j: False) == [0, 1]
    assert greedy_clusters([f"about {one} here", f"about {other} here"], lambda i, j: False) == [0, 1]


PIECES = ["a", "B", "é", "Ü", "5", ".", "-", "+", "#", "%", "&", "/", " ", "²", "ü\u0323", "が", "각", "ß", "the "]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(plain_form))
def test_neither_form_nor_markup_nor_quotes_split(text: str) -> None:
    key = identity_key(text)
    for form in ("NFC", "NFD"):
        assert identity_key(unicodedata.normalize(form, text)) == key
    assert identity_key(html.escape(text)) == key
    assert identity_key(f" “{text.strip()}”") == identity_key(f"'{text.strip()}'") == key


NESTED = [
    *PIECES,
    *"\"'“”«»`,;:!?()",
    "''",
    "an ",
    "The ",
    "&amp;",
    "lt;",
    "&#38;",
    "mW",
    "May ",
    "2020",
    "。",
    "؟",
    "\u0301",
]


@given(st.lists(st.sampled_from(NESTED), max_size=10).map("".join) | st.text(max_size=20))
@example('the "the x"')
@example("&amp;amp;lt;")
@example("sin''")
@example("\u0301\u0316" * 99)
def test_the_form_of_a_form_is_itself(text: str) -> None:
    assert plain_form(plain_form(text)) == plain_form(text)


@given(st.text(max_size=20))
def test_no_text_is_nothing(text: str) -> None:
    assert (identity_key(text) != "") == (text.strip() != "")
    assert identity_key(unicodedata.normalize("NFD", text)) == identity_key(unicodedata.normalize("NFC", text))


def test_a_long_run_of_marks_is_sorted_in_pieces() -> None:
    """Canonical order takes the square of the length of a run: 200 kB of marks would take a minute."""
    form = plain_form("a" + "\u0301\u0316" * 99)
    runs = "".join(character if unicodedata.combining(character) else " " for character in form).split()
    assert len(runs) > 1 and max(map(len, runs)) <= 31


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
