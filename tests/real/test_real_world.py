"""The world of examples/real_world: facts, questions, the scripted agent and what becomes of its turns."""

from __future__ import annotations

import random
from pathlib import Path

import pandas as pd
import pytest
from verl.utils.siop.turn_utils import (
    extract_answer,
    extract_observations,
    extract_queries,
    get_assistant_turn_ranges,
    parse_answer,
)

from examples.real_world import build
from examples.real_world.agent import (
    LAZY,
    REPEATED,
    RIGHT,
    STALE,
    UNNEEDED,
    WAYS,
    WRONG,
    mixture,
    needed_facts_found,
    stale_answer,
    transcript,
)
from examples.real_world.rollouts import chat_of, rollout_of, search_tool
from examples.real_world.world import TEMPLATES, facts, questions, sample_questions
from examples.toy_world import build as build_toy


@pytest.fixture(scope="module")
def search():
    return search_tool()


def test_facts_are_in_plain_english() -> None:
    passages = {fact.passage for fact in facts()}
    assert {
        "Paris is the capital of France.",
        "The currency of Japan is the yen.",
        "The international calling code of the United Kingdom is +44.",
        "Portugal has a land border with one country only, Spain.",
        "The Philippines is a country in Asia.",
    } <= passages
    assert not [text for text in passages if "  " in text or text != text.strip() or not text.endswith(".")]
    assert len({(fact.subject, fact.relation) for fact in facts()}) == len(facts())  # one answer each


def test_every_question_has_one_answer_that_it_does_not_name() -> None:
    assert {question.template for question in questions()} == set(TEMPLATES)
    assert len({question.text for question in questions()}) == len(questions()) > 1500
    for question in questions():
        first, second = question.facts
        assert {first.subject, first.object} == set(question.chain[:2])
        assert (second.subject, second.object) == question.chain[1:]
        assert question.gold not in question.text and question.bridge not in question.text
        assert question.gold != stale_answer(question)


def test_a_sample_holds_the_smaller_ones() -> None:
    assert sample_questions(200)[:50] == sample_questions(50)
    assert len({question.template for question in sample_questions(len(TEMPLATES))}) == len(TEMPLATES)
    with pytest.raises(ValueError, match="1 to"):
        sample_questions(10**6)


def test_the_ways_of_the_agent(search) -> None:
    at_once = 0
    for question in sample_questions(200):
        played = {way: transcript(question, way, search, random.Random(0)) for way in WAYS}
        found = {way: needed_facts_found(question, one) for way, one in played.items()}
        # The retriever finds both facts, now and then at once.
        assert found[RIGHT][0] and found[RIGHT][-1]
        if not found[RIGHT][1]:
            at_once += 1
            continue
        assert found[LAZY] == [True, False] and played[LAZY].answer == question.bridge
        # Its second search may find the right fact beside that of Guinea-Bissau.
        assert not found[WRONG][-1] and played[WRONG].answer in played[WRONG].searches[1].found
        for way in (REPEATED, UNNEEDED):
            assert sum(found[way]) == 3 and len(found[way]) == 4 and found[way][-1]
        assert not found[STALE][-1] and played[STALE].answer == stale_answer(question)
    assert at_once < 5
    question = sample_questions(1)[0]
    assert mixture(question, 8, search)[:3] == mixture(question, 3, search)
    with pytest.raises(ValueError, match="right, lazy"):
        transcript(question, "clever", search, random.Random(0))


def test_rollouts_read_back_as_they_were_played(smollm2: Path, search) -> None:
    chat = chat_of(str(smollm2))
    for question in sample_questions(7):
        for way in WAYS:
            played = transcript(question, way, search, random.Random(1))
            rollout = rollout_of(question, played, chat, "q")
            turns = get_assistant_turn_ranges(rollout.response_mask)
            assert len(turns) == len(played.searches) + 1
            assert extract_answer(rollout.response_ids, turns, chat.tokenizer, rollout.prompt_ids) == played.answer
            observations = extract_observations(rollout.response_ids, turns, chat.tokenizer)
            assert all(one.found in text for one, text in zip(played.searches, observations, strict=True))
            assert all(len(calls) == 1 for calls in extract_queries(rollout.response_ids, turns[:-1], chat.tokenizer))
            assert all(rollout.response_ids[end - 1] == chat.tokenizer.eos_token_id for _, end in turns)
            prompt = chat.tokenizer.decode(rollout.prompt_ids)
            assert question.text in prompt and prompt.endswith("<|im_start|>assistant\n")
            assert parse_answer(chat.tokenizer.decode(rollout.response_ids[slice(*turns[-1])])) == played.answer


def test_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--train-questions", "20", "--eval-questions", "10"]
    assert build.main(arguments) == 0
    train, held_out = (pd.read_parquet(tmp_path / f"{split}.parquet") for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (20, 10)
    asked = [{row["question"] for row in part["extra_info"]} for part in (train, held_out)]
    assert not asked[0] & asked[1]
    assert [message["role"] for message in train["prompt"][0]] == ["system", "user"]
    assert (tmp_path / "corpus.jsonl").read_text().count("\n") == len(facts())

    def written() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}

    before = written()
    capsys.readouterr()
    assert build.main(arguments) == 0 and capsys.readouterr().out == f"{tmp_path} is up to date\n"
    # Another world is not written over it.
    assert build.main([*arguments, "--train-questions", "21"]) == 2
    assert '"train_questions": 20' in (error := capsys.readouterr().err) and '"train_questions": 21' in error
    assert written() == before
    # Interrupted before its last file.
    (tmp_path / "eval.parquet").unlink()
    assert build.main(arguments) == 0 and written().keys() == before.keys()


def test_build_leaves_a_toy_world_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = ["--out", str(tmp_path), "--data-only", "--train-questions", "8", "--eval-questions", "8"]
    assert build_toy.main(toy) == 0
    corpus = (tmp_path / "corpus.jsonl").read_bytes()
    assert build.main(["--out", str(tmp_path)]) == 2
    assert f"error: {tmp_path} holds meta.json, corpus.jsonl" in capsys.readouterr().err
    assert (tmp_path / "corpus.jsonl").read_bytes() == corpus and build_toy.main(toy) == 0
    # Nor the other way round.
    assert build.main(["--out", str(tmp_path / "real"), "--train-questions", "8", "--eval-questions", "8"]) == 0
    assert build_toy.main([*toy, "--out", str(tmp_path / "real")]) == 2
    # Nor what no file describes.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.parquet").write_text("all I have")
    assert build.main(["--out", str(tmp_path / "mine")]) == 2
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["train.parquet"]


@pytest.mark.parametrize(
    ("option", "count", "allowed"),
    [
        ("--eval-questions", "-5", "at least 1, got -5"),
        ("--train-questions", "0", "at least 1, got 0"),
        ("--train-questions", "1000000", "there are 1 to"),
    ],
)
def test_build_refuses_wrong_counts(
    option: str, count: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build.main(["--out", str(tmp_path / "world"), option, count])
    error = capsys.readouterr().err
    assert option in error and count in error and allowed in error and not (tmp_path / "world").exists()
