"""What holds for any questions: samples that do not move, one of each pair, no evaluation question in the training."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from verl.utils.siop.data.questions import Question
from verl.utils.siop.data.rows import canonical, question_key, rank, row_of
from verl.utils.siop.data.select import Part, decontaminate, dedupe, sample

NAMES = st.sampled_from(["nq", "popqa"])
TEXTS = st.sampled_from(["Who?", "who", "What is it?", "Where", "“Where”!", "When did it end"])
ALIASES = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=2, unique=True)


@st.composite
def parts(draw: st.DrawFn, name: st.SearchStrategy[str] = NAMES) -> Part:
    found = draw(st.lists(st.tuples(name, st.integers(0, 40), TEXTS, ALIASES), unique_by=lambda x: x[:2], max_size=30))
    part = Part()
    for set_name, number, text, aliases in found:
        question = Question(set_name, "train", str(number), text, aliases, 1, "file")
        part.questions.setdefault(set_name, []).append(question)
    return part


def ids(part: Part, name: str = "nq") -> list[str]:
    return [question.id for question in part.questions.get(name, [])]


def sampled(part: Part, count: int, seed: int) -> Part:
    chosen = copy.deepcopy(part)
    sample(chosen, count, seed)
    return chosen


@given(parts(), st.integers(1, 10), st.integers(0, 5))
def test_a_sample_is_what_the_digests_say(part: Part, count: int, seed: int) -> None:
    for name in part.questions:
        order = {key: hashlib.sha256(json.dumps([seed, name, key]).encode()).hexdigest() for key in ids(part, name)}
        wanted = sorted(order, key=order.__getitem__)[:count]
        assert ids(sampled(part, count, seed), name) == [key for key in ids(part, name) if key in wanted]


@given(parts(st.just("nq")), parts(), st.integers(1, 10), st.integers(0, 5), st.randoms())
def test_other_sets_other_rows_and_their_order_do_not_move_a_sample(
    part: Part, more: Part, count: int, seed: int, random
) -> None:
    before = sampled(part, count, seed)
    grown = copy.deepcopy(part)
    known = set(ids(part))
    added = [question for question in more.questions.get("nq", []) if question.id not in known]
    grown.questions["nq"] = [*part.questions.get("nq", []), *added]
    grown.questions["popqa"] = more.questions.get("popqa", [])
    random.shuffle(grown.questions["nq"])
    after = sampled(grown, count, seed)
    # Of the old rows those remain that no new one of a lower rank has pushed out.
    ranks = {question.id: rank(seed, question) for question in grown.questions["nq"]}
    lowest = set(sorted(ranks, key=ranks.__getitem__)[:count])
    assert set(ids(after)) == lowest and set(ids(after)) & known <= set(ids(before))
    # A larger sample holds the smaller one.
    assert set(ids(before)) <= set(ids(sampled(part, count + 1, seed)))


@given(parts(), st.integers(0, 3), st.randoms())
def test_dedupe_leaves_one_of_each_pair_whatever_the_order(part: Part, seed: int, random) -> None:
    def pairs(of: Part, name: str) -> Counter[tuple[str, frozenset[str]]]:
        return Counter((question_key(each.text), frozenset(each.aliases)) for each in of.questions[name])

    clean, shuffled = copy.deepcopy(part), copy.deepcopy(part)
    for questions in shuffled.questions.values():
        random.shuffle(questions)
    dedupe(clean, seed)
    dedupe(shuffled, seed)
    for name in part.questions:
        assert pairs(clean, name) == Counter(set(pairs(part, name)))
        assert sorted(ids(clean, name)) == sorted(ids(shuffled, name))
        lost = len(part.questions[name]) - len(clean.questions[name])
        assert clean.dropped.get(name, Counter()).total() == lost
    again = copy.deepcopy(clean)
    dedupe(again, seed)
    assert again.questions == clean.questions


@given(parts(), parts())
def test_decontamination_drops_what_is_asked_and_nothing_else(train: Part, evaluation: Part) -> None:
    before = copy.deepcopy(train)
    dropped = decontaminate(train, evaluation)
    asked = {question_key(each.text) for questions in evaluation.questions.values() for each in questions}
    for name, questions in before.questions.items():
        kept = [each for each in questions if question_key(each.text) not in asked]
        assert train.questions[name] == kept
        assert dropped.get(name, []) == [each.id for each in questions if each not in kept]


@settings(max_examples=50)
@given(st.text(), st.lists(st.text(min_size=1), min_size=1))
def test_canonical_rows_are_lines_that_say_what_the_row_says(text: str, aliases: list[str]) -> None:
    question = Question("nq", "train", "1", text, aliases, 1, "file")
    row = row_of(question, 0, [{"role": "user", "content": text}], True, 10, None)
    line = canonical(row)
    assert line.count(b"\n") == 1 and json.loads(line) == row
    assert canonical(json.loads(line)) == line
