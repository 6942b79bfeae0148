"""A rollout as a line of questions.jsonl: its id, its scores, what the file can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import byte_tokenizer, tool_result
from verl.trainer.siop.evaluation.questions import (
    EvaluationError,
    Question,
    Sample,
    lines_of,
    question_ids,
    read_lines,
    sample_of,
)
from verl.trainer.siop.rollouts.tool_calls import FIELD, ToolRecord
from verl.utils.reward_score.siop_reward import compute_score
from verl.utils.siop.credit.answers import f1_release, f1_score


# By hand: tokens of the answer and of the alias as sets.
@pytest.mark.parametrize(
    ("response", "aliases", "expected"),
    [
        ("<answer>Paris</answer>", ["paris"], 1.0),
        # {the, eiffel, tower} and {eiffel, tower}: articles count.
        ("<answer>The Eiffel Tower</answer>", ["Eiffel Tower"], 2 * 2 / 5),
        # {u, s, a} and {usa}: punctuation separates.
        ("<answer>U.S.A.</answer>", ["USA"], 0.0),
        ("<answer>U.S.A.</answer>", ["USA", "u s a"], 1.0),
        # {jean, luc, picard} and {jean, luc}
        ("<answer>Jean-Luc Picard</answer>", ["Jean Luc"], 2 * 2 / 5),
        # {new, york} twice: repeated tokens count once.
        ("<answer>New York, New York</answer>", ["New York"], 1.0),
        # {1, 000, people} and {1000, people}
        ("<answer>1,000 people</answer>", ["1000 people"], 2 * 1 / 5),
        # {february, 7, 2016} and {7, february}; the best alias counts.
        ("<answer> February 7, 2016 </answer>", ["2016", "7 February"], 2 * 2 / 5),
        # The first answer counts, the last is right.
        ("<answer>Rome</answer> no: <answer>Paris</answer>", ["Paris"], 0.0),
        # Of the whole response: what the model thought, what a tool returned.
        ("<think><answer>Paris</answer></think><answer>Rome</answer>", ["Paris"], 1.0),
        (f"{tool_result('<answer>Paris</answer>')}<answer>Rome</answer>", ["Paris"], 1.0),
        ("<answer>Par\nis</answer>", ["par is"], 1.0),
        ("<answer>?!</answer>", ["?!"], 0.0),
        ("<answer></answer>", ["Paris"], 0.0),
        ("Paris", ["Paris"], 0.0),
        ("<answer>Paris", ["Paris"], 0.0),
        ("<answer>Paris</answer>", [], 0.0),
        ("<answer>東京 Tower</answer>", ["東京"], 2 * 1 / 3),
    ],
)
def test_f1_of_the_release(response: str, aliases: list[str], expected: float) -> None:
    assert f1_release(response, aliases) == pytest.approx(expected, abs=1e-12)


def test_both_f1_differ_where_they_are_said_to() -> None:
    for answer, alias in (("The Eiffel Tower", "Eiffel Tower"), ("U.S.A.", "USA"), ("york york", "new york")):
        assert f1_release(f"<answer>{answer}</answer>", [alias]) != f1_score(answer, [alias])


def row(**changes: Any) -> dict[str, Any]:
    """A rollout as TransferQueue has it: two turns with a tool result between."""
    call, result, final = (
        "<tool_call>x</tool_call><|im_end|>",
        tool_result("Paris, France"),
        "<answer>The Paris</answer>",
    )
    texts = [(call, 1), (result, 0), (final, 1)]
    ids = [list(byte_tokenizer()(text)["input_ids"]) for text, _ in texts]
    record = ToolRecord(executed=1, unparsed=1, dropped=1).as_dict()
    return {
        "data_source": "nq",
        "raw_prompt": [{"role": "user", "content": "Where?"}],
        "reward_model": {"ground_truth": {"target": ["Paris"]}},
        "extra_info": {},
        "responses": torch.tensor([token for part in ids for token in part]),
        "response_mask": torch.tensor([m for part, (_, m) in zip(ids, texts, strict=True) for _ in part]),
        "extra_fields": {FIELD: record},
        **changes,
    }


def sample(max_turns: int | None = 5, **changes: Any) -> Sample:
    made = row(**changes)
    return sample_of(Question.of(made), made, byte_tokenizer(), max_turns, name="q7", number=1)


def test_a_rollout_as_a_line() -> None:
    made = row()
    assert sample() == Sample(
        data_source="nq",
        id="q7",
        question="Where?",
        sample=1,
        answer="The Paris",
        em=1.0,
        f1=1.0,
        f1_release=2 / 3,
        reachable=None,
        no_answer=False,
        turns=2,
        turn_limit=False,
        response_tokens=int(made["response_mask"].sum()),
        searches=1,
        failed_searches=2,
        truncated=False,
    )


def test_what_a_rollout_lacks() -> None:
    no_label = sample(reward_model={"ground_truth": None}, extra_fields={})
    assert (no_label.em, no_label.f1, no_label.f1_release) == (None, None, None)
    assert (no_label.searches, no_label.failed_searches, no_label.truncated) == (None, None, None)
    foreign = sample(reward_model={"ground_truth": {"mine": 3}})
    assert foreign.em is None and foreign.answer == "The Paris"
    assert sample(extra_info={"reachable": np.bool_(False), "question": "Where, really?"}).reachable is False


def test_the_limit_on_turns_counts_where_it_left_no_answer() -> None:
    ids = list(byte_tokenizer()("<tool_call>x</tool_call>")["input_ids"])
    silent = {"responses": torch.tensor(ids), "response_mask": torch.ones(len(ids), dtype=torch.long)}
    cut = {"extra_fields": {FIELD: ToolRecord(truncated=1).as_dict()}}
    assert sample(1, **silent).turn_limit and sample(1, **silent).no_answer
    assert not sample(2, **silent).turn_limit and not sample(None, **silent).turn_limit
    assert sample(1, **silent, **cut).truncated and not sample(1, **silent, **cut).turn_limit
    assert not sample(2).turn_limit


def test_the_answer_is_the_one_that_compute_score_reads() -> None:
    text = "<answer>Rome</answer> or so"
    ids = list(byte_tokenizer()(text)["input_ids"])
    written: dict[str, Any] = {"responses": torch.tensor(ids), "response_mask": torch.ones(len(ids), dtype=torch.long)}
    assert sample(**written).answer == "Rome"
    # The prompt had opened the thinking, which never ended.
    inside: dict[str, Any] = {"extra_fields": {FIELD: {**ToolRecord().as_dict(), "thinking": 1}}}
    found = sample(**written, **inside)
    assert found.answer == "" and found.no_answer and found.f1 == 0
    assert compute_score("nq", text, "Rome", inside["extra_fields"])["f1"] == 0


def question(source: str = "nq", text: str = "Where?", gold: str = "Paris", **extra: Any) -> Question:
    content = [{"role": "user", "content": text}]
    fields = {"data_source": source, "raw_prompt": content, "reward_model": {"ground_truth": gold}}
    return Question.of({**fields, "extra_info": extra})


def test_ids_are_of_the_data_or_of_the_content() -> None:
    asked = {"a": question(id="test_0"), "b": question("tq", id="test_0"), "c": question(), "d": question(text="Who?")}
    ids = question_ids(asked)
    assert ids["a"] == ids["b"] == "test_0"
    assert ids["c"] != ids["d"] and all(len(ids[uid]) == 16 for uid in "cd")
    # The instructions around a question do not count where the data names it; a question with other answers is another.
    around = question(text="Answer: Where?", question="Where?")
    assert question_ids({"x": around})["x"] == ids["c"] != question_ids({"x": question(gold="Lyon")})["x"]


def test_questions_of_one_id_are_told_apart_alike_in_every_evaluation() -> None:
    twins = {"u1": question(id=5, gold="Paris"), "u2": question(id=5, gold="Lyon")}
    names = question_ids(twins)
    assert sorted(names.values()) == ["5", "5#2"]
    swapped = question_ids({"u0": twins["u2"], "u9": twins["u1"]})
    assert (swapped["u9"], swapped["u0"]) == (names["u1"], names["u2"])
    equal = question_ids({"u1": question(index=8), "u2": question(index=3)})
    assert question_ids({"u3": question(index=3), "u8": question(index=8)})["u8"] == equal["u1"]


def test_the_file_holds_any_text(tmp_path: Path) -> None:
    answers = ["a\u2028b\x85c", 'tab\t "quoted" \\ \x1b[31mred', "東京", "", "\r\n"]
    samples = [sample().model_copy(update={"answer": answer, "sample": i}) for i, answer in enumerate(answers)]
    content = lines_of(reversed(samples))
    assert read_lines(content, tmp_path) == samples
    assert "東京".encode() in content and b"\x1b" not in content and content.count(b"\n") == len(answers)
    assert json.loads(content.split(b"\n")[2])["answer"] == "東京"


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    line = lines_of([sample()])
    with pytest.raises(EvaluationError, match="line 2 is no sample"):
        read_lines(line + b"{}\n", tmp_path)
    with pytest.raises(EvaluationError, match="line 1 is no sample"):
        read_lines(line[:50] + b"\n", tmp_path)
    with pytest.raises(EvaluationError, match="twice"):
        read_lines(line * 2, tmp_path)
