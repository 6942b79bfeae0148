"""EM, F1, gold aliases, verl's custom reward function and the placement of turn rewards."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_helpers import tool_result
from transformers.data.metrics import squad_metrics
from verl.trainer.siop.report import core_metrics, rows
from verl.utils.reward_score.siop_reward import (
    compute_score,
    exact_match,
    f1_score,
    last_assistant_text,
    parse_aliases,
    place_turn_rewards,
    turn_spans,
)
from verl.utils.siop.errors import RolloutError
from verl.utils.siop.turn_utils import get_assistant_turn_ranges


@pytest.mark.parametrize(
    ("answer", "aliases", "em", "f1"),
    [
        # SQuAD dev set, Super Bowl 50: gold answers of its first questions.
        ("Denver Broncos", ["Denver Broncos", "Denver Broncos", "Denver Broncos"], 1.0, 1.0),
        ("the Denver Broncos!", ["Denver Broncos"], 1.0, 1.0),
        ("Broncos", ["Denver Broncos"], 0.0, 2 / 3),
        (
            "Santa Clara",
            [
                "Santa Clara, California",
                "Levi's Stadium",
                "Levi's Stadium in the San Francisco Bay Area at Santa Clara, California.",
            ],
            0.0,
            0.8,
        ),
        ("Levis Stadium", ["Santa Clara, California", "Levi's Stadium"], 1.0, 1.0),
        ("february 7 2016", ["February 7, 2016", "February 7"], 1.0, 1.0),
        # SQuAD 2.0 dev set, Normans: gold answers of its first questions.
        ("france", ["France", "France", "France", "France"], 1.0, 1.0),
        ("the 10th and 11th centuries", ["10th and 11th centuries", "in the 10th and 11th centuries"], 1.0, 1.0),
        ("10th to 11th centuries", ["10th and 11th centuries", "in the 10th and 11th centuries"], 0.0, 0.75),
        ("Denmark, Norway", ["Denmark, Iceland and Norway"], 0.0, 2 / 3),
        # Repeated tokens count as often as both have them.
        ("very very good", ["very very bad"], 0.0, 2 / 3),
        ("new new york", ["new york"], 0.0, 0.8),
        ("york york", ["new york"], 0.0, 0.5),
        ("Lyon", ["Paris"], 0.0, 0.0),
        ("", ["Paris"], 0.0, 0.0),
        ("", ["The"], 0.0, 0.0),
        ("a", ["the"], 1.0, 1.0),
        ("東京", ["東京", "Tokyo"], 1.0, 1.0),
        ("Paris", [], 0.0, 0.0),
    ],
)
def test_em_and_f1(answer: str, aliases: list[str], em: float, f1: float) -> None:
    assert exact_match(answer, aliases) == em
    assert f1_score(answer, aliases) == pytest.approx(f1, abs=1e-12)


@given(
    *[st.lists(st.sampled_from(["The", "a", "new", "New", "York,", "york", "NY!", "'s", "東京"]), max_size=6)] * 2,
)
def test_em_and_f1_equal_the_evaluation_of_squad_as_transformers_has_it(answer: list[str], gold: list[str]) -> None:
    text, alias = " ".join(answer), " ".join(gold)
    if text:  # no answer at all scores 0, whatever the gold answer is
        assert exact_match(text, [alias]) == squad_metrics.compute_exact(alias, text)
        assert f1_score(text, [alias]) == pytest.approx(squad_metrics.compute_f1(alias, text), abs=1e-12)


@given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=4))
def test_f1_bounds_em_and_more_aliases_never_hurt(answer: str, aliases: list[str]) -> None:
    em, f1 = exact_match(answer, aliases), f1_score(answer, aliases)
    assert 0.0 <= em <= f1 <= 1.0
    assert f1_score(answer, [*aliases, "another"]) >= f1
    assert f1_score(answer, aliases[::-1]) == f1


@pytest.mark.parametrize(
    ("ground_truth", "aliases"),
    [
        ("Paris", ["Paris"]),
        ("New York<|answer_split|> NYC <|answer_split|>", ["New York", "NYC"]),
        (["Paris", "Paris ", "Lutetia"], ["Paris", "Lutetia"]),
        (("a", "b<|answer_split|>c"), ["a", "b", "c"]),
        (np.array(["Paris", "Lutetia"], dtype=object), ["Paris", "Lutetia"]),
        ({"target": ["Paris"]}, ["Paris"]),
        ({"target": np.array(["Paris"], dtype=object), "style": "rule"}, ["Paris"]),
        ({"ground_truth": {"target": "Paris<|answer_split|>Lutetia"}}, ["Paris", "Lutetia"]),
        ({"ground_truth": [["Paris"], ["Lutetia", "Lutece"]]}, ["Paris", "Lutetia", "Lutece"]),
        (1969, ["1969"]),
        (1969.0, ["1969"]),
        (np.float32(1969), ["1969"]),
        (np.array([2.5, -0.0, np.nan]), ["2.5", "0"]),
        (math.nan, []),
        (np.float32("nan"), []),
        (None, []),
        ([], []),
        ("", []),
        ({"target": None}, []),
        ({"target": []}, []),
        ({"target": None, "ground_truth": "Paris"}, ["Paris"]),
        ({"target": math.nan, "ground_truth": {"target": [], "ground_truth": 1969.0}}, ["1969"]),
        ({"target": "Paris", "ground_truth": "Lutetia"}, ["Paris"]),
        ({"target": "", "ground_truth": []}, []),
        (np.array([None], dtype=object), []),
    ],
)
def test_gold_answers_in_the_forms_of_data_sets(ground_truth: Any, aliases: list[str]) -> None:
    assert parse_aliases(ground_truth) == aliases


@pytest.mark.parametrize("ground_truth", [{"answer": "Paris"}, {}, object(), b"Paris"])
def test_an_unknown_form_of_gold_answers_is_refused(ground_truth: Any) -> None:
    with pytest.raises(ValueError, match="ground truth"):
        parse_aliases(ground_truth)


CALL = "<think>first</think><answer>Rome</answer><tool_call>search</tool_call><|im_end|>"
FINAL = "<think><answer>Nice</answer></think><answer>Paris</answer><|im_end|>"


def _without_special_tokens(text: str) -> str:
    return text.replace("<|im_start|>", "").replace("<|im_end|>", "")


@pytest.mark.parametrize("strip", [lambda text: text, _without_special_tokens])
def test_the_last_assistant_turn_is_scored_not_the_tools(strip: Any) -> None:
    lure = tool_result("<answer>Lyon</answer>")
    assert compute_score("d", strip(CALL + lure + FINAL), "Paris") == {"score": 1.0, "em": 1.0, "f1": 1.0}
    for wrong in ("Lyon", "Rome", "Nice"):
        assert compute_score("d", strip(CALL + lure + FINAL), wrong)["em"] == 0.0
        assert compute_score("d", strip(CALL + lure + "<think>done</think><|im_end|>"), wrong)["em"] == 0.0
    # Two tool results in one observation; a template without tool_response tags; a response of one turn.
    two = lure.replace("\n</tool_response>", "</tool_response>\n<tool_response>\n<answer>Lyon</answer></tool_response>")
    assert compute_score("d", strip(CALL + two + FINAL), "Paris")["em"] == 1.0
    bare = "\n<|im_start|>tool\n<answer>Lyon</answer><|im_end|>\n<|im_start|>assistant\n"
    assert compute_score("d", strip(CALL + bare + FINAL), "Paris")["em"] == 1.0
    assert compute_score("d", strip(CALL + bare + "no answer"), "Lyon")["em"] == 0.0
    assert compute_score("d", strip(FINAL), ["Lutetia", "paris"])["em"] == 1.0


def test_a_trailing_observation_is_not_the_last_turn() -> None:
    text = FINAL + tool_result("<answer>Lyon</answer>")
    for form in (text, _without_special_tokens(text)):
        assert compute_score("d", form, "Paris")["em"] == 1.0
        assert compute_score("d", form, "Lyon")["em"] == 0.0
    assert last_assistant_text(tool_result("Doc")) == ""


def test_a_label_that_a_data_set_keeps_as_a_float() -> None:
    assert compute_score("d", "<answer>1969</answer>", {"target": 1969.0}) == {"score": 1.0, "em": 1.0, "f1": 1.0}


def test_an_answer_that_is_the_word_assistant() -> None:
    assert compute_score("d", "user\nx\nassistant\n<answer>\nassistant\n</answer>", "Assistant")["em"] == 1.0


@pytest.mark.parametrize("missing", [None, math.nan, [], {"target": None}, {"ground_truth": {"target": []}}])
def test_without_a_label_there_is_no_metric(missing: Any) -> None:
    assert compute_score("d", FINAL, missing, {"split": "test"}, more=1) == {"score": 0.0, "em": None, "f1": None}


def test_verls_validation_averages_over_labelled_rows_only() -> None:
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    scores = [compute_score("d", FINAL, truth) for truth in ("Paris", "Lyon", None)]
    infos = {key: [score[key] for score in scores] for key in scores[0]}
    found = process_validation_metrics(["d"] * 3, ["a", "b", "c"], infos)
    assert found["d"]["em"]["mean@1"] == 0.5
    assert found["d"]["f1"]["mean@1"] == 0.5


def test_validation_reports_em_and_f1_by_data_source_and_averaged() -> None:
    from verl.trainer.siop.trainer import SiopTrainer

    scores = [compute_score("d", FINAL, truth) for truth in ("Paris", "Lyon", "Paris", "Paris Lyon", None)]
    infos = {key: [score[key] for score in scores] for key in scores[0]} | {"reward": [s["score"] for s in scores]}
    sources = np.array(["nq", "nq", "hotpot/dev", "nq", "none"])
    upstream = object.__new__(SiopTrainer)._val_metrics_update(sources, list("abcde"), infos, [])
    found = core_metrics(upstream)
    assert found == pytest.approx(
        {
            "val-core/nq/em/mean@1": 1 / 3,
            "val-core/nq/f1/mean@1": (1 + 2 / 3) / 3,
            "val-core/hotpot/dev/em/mean@1": 1.0,
            "val-core/hotpot/dev/f1/mean@1": 1.0,
            "val-core/average/em/mean@1": (1 / 3 + 1) / 2,
            "val-core/average/f1/mean@1": (5 / 9 + 1) / 2,
        }
    )
    assert [source for source, _, _ in rows(upstream | found)] == ["hotpot/dev", "nq", "average"]
    assert core_metrics({"val-core/nq/reward/mean@1": 1.0}) == {}


def test_turn_rewards_land_on_the_last_token_of_each_turn() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]])
    placed = place_turn_rewards([[0.25, -1.5], [2.0], [], []], mask)
    assert isinstance(placed, torch.Tensor)
    assert placed.dtype == torch.float32
    assert placed.tolist() == [[0, 0.25, 0, -1.5, 0], [0, 0, 0, 0, 2.0], [0] * 5, [0] * 5]


@given(st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=5), st.booleans())
def test_placement_equals_a_loop_over_turns(masks: list[list[int]], empty_first: bool) -> None:
    rewards = [[0.5 + n for n, _ in enumerate(get_assistant_turn_ranges(mask))] for mask in masks]
    if empty_first and rewards:
        rewards[0] = []
    expected = []
    for mask, given_rewards in zip(masks, rewards, strict=True):
        row = [0.0] * len(mask)
        for (_, end), reward in zip(get_assistant_turn_ranges(mask), given_rewards, strict=False):
            row[end - 1] = reward
        expected.append(row)
    assert [row.tolist() for row in place_turn_rewards(rewards, masks)] == expected
    assert [row.tolist() for row in place_turn_rewards(rewards, [torch.tensor(m) for m in masks])] == expected


@given(st.integers(0, 6).flatmap(lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width))))
def test_turn_spans_equal_the_ranges_of_each_row(masks: list[list[bool]]) -> None:
    width = len(masks[0]) if masks else 0
    found = turn_spans(np.array(masks, dtype=bool).reshape(len(masks), width))
    expected = [
        (row, row * width + start, row * width + end)
        for row, mask in enumerate(masks)
        for start, end in get_assistant_turn_ranges([int(on) for on in mask])
    ]
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected


def test_placement_refuses_what_does_not_fit() -> None:
    with pytest.raises(RolloutError, match="rollout 1 has 2 assistant turns in its mask, but 1 turn rewards"):
        place_turn_rewards([[1.0], [1.0]], [[1, 1], [1, 0, 1]])
    with pytest.raises(RolloutError, match="1 rollouts have turn rewards, but 2 have masks"):
        place_turn_rewards([[1.0]], [[1], [1]])
    for wrong in (1e39, math.inf, math.nan):
        with pytest.raises(RolloutError, match="rollout 2 has a turn reward that is no finite number in float32"):
            place_turn_rewards([[1.0], [], [1.0, wrong]], [[1], [1], [1, 0, 1]])
    with pytest.raises(RolloutError, match="two dimensions"):
        place_turn_rewards([[1.0]], torch.tensor([1]))
    with pytest.raises(RolloutError, match="only 0 and 1"):
        place_turn_rewards([[1.0]], torch.tensor([[2]]))
    for wrong in (-1.0, 0.5, math.nan):
        with pytest.raises(RolloutError, match="only 0 and 1"):
            place_turn_rewards([[1.0]], torch.tensor([[1.0, wrong]]))
