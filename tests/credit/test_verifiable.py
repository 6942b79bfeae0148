"""VPR: scores of turns become turn rewards, and with turn_index and gamma 0 the paper's advantage."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from method_helpers import byte_tokenizer, rollout
from turn_tensors import batch_of, by_turn
from verl.trainer.siop.advantage import compute_siop_advantage
from verl.utils.siop.credit.metrics import group_metrics
from verl.utils.siop.errors import RolloutError
from verl.utils.siop.siop_process_reward import Rollout, SiopConfig, compute_group_rewards

VPR = SiopConfig(siop_reward_mode="verifiable")


class NoScorer:
    """Fails when it is asked anything."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the scorer was asked for {name}")


def played(uid: str, scores: Any, turns: int | None = None, outcome: Any = None) -> Rollout:
    count = len(scores) if turns is None else turns
    made = rollout(uid, ["<action> 1 </action><|im_end|>"] * count, ["\nboard\n"] * (count - 1))
    return dataclasses.replace(made, turn_scores=scores, outcome=outcome)


def rewards_of(rollouts: Sequence[Rollout], config: SiopConfig = VPR) -> Any:
    return asyncio.run(compute_group_rewards(rollouts, byte_tokenizer(), config, NoScorer()))


def test_a_turn_earns_its_score_and_nobody_is_asked() -> None:
    rollouts = [played("a", [1.0, 0.0, 1]), played("a", [0.0]), played("b", [-1.0, 0.5])]
    result = rewards_of(rollouts)
    assert result.turn_rewards == [[1.0, 0.0, 1.0], [0.0], [-1.0, 0.5]]
    assert result.cluster_ids == [None] * 3 and result.support == [[]] * 3
    metrics = group_metrics(result, rollouts, VPR, gamma=0.0)
    assert not any("answer" in name or "cluster" in name for name in metrics)
    assert metrics["siop/turn_reward/turn_1/mean"] == 0.0
    assert metrics["siop/return_to_go/turn_1/mean"] == 0.0


def test_the_outcome_counts_on_the_last_turn_by_its_weight() -> None:
    weighted = dataclasses.replace(VPR, siop_outcome_weight=0.5)
    assert rewards_of([played("a", [1.0, 0.0], outcome=1.0)], weighted).turn_rewards == [[1.0, 0.5]]
    assert rewards_of([played("a", [1.0, 0.0], outcome=1.0)]).turn_rewards == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("scores", "turns", "message"),
    [
        (None, 2, "its agent loop gave none"),
        ([1.0], 2, "2 assistant turns in its mask, but 1 turn scores"),
        ([1.0, 0.0, 1.0], 2, "2 assistant turns in its mask, but 3 turn scores"),
        ([1.0, math.nan], 2, "score of turn 2 .* finite number, got nan"),
        ([math.inf, 1.0], 2, "score of turn 1 .* finite number, got inf"),
        ([True, 1.0], 2, "score of turn 1 .* finite number, got True"),
        ([10**400, 1.0], 2, "score of turn 1 .* finite number, got 1000"),
        (["1", 1.0], 2, "score of turn 1 .* finite number, got '1'"),
    ],
)
def test_a_score_that_is_missing_or_no_number_names_the_rollout(scores: Any, turns: int, message: str) -> None:
    with pytest.raises(RolloutError, match=message) as error:
        rewards_of([played("q7", scores, turns)])
    assert "rollout of question 'q7'" in str(error.value)


@pytest.mark.parametrize("outcome", [None, math.nan])
def test_a_weighted_outcome_must_be_there(outcome: Any) -> None:
    config = dataclasses.replace(VPR, siop_outcome_weight=1.0)
    with pytest.raises(RolloutError, match="outcome of a rollout of question 'q7' must be a finite number"):
        rewards_of([played("q7", [1.0], outcome=outcome)], config)


def _by_hand(scores: list[list[float]]) -> list[list[float]]:
    """A_{i,t} = (r_{i,t} − mean_t) / (std_t + 1e-6) over the rollouts that are active at turn t; std of the sample, 1
    for one below 1e-6; 0 where one rollout is alone."""
    advantages = [[0.0] * len(row) for row in scores]
    for turn in range(max(map(len, scores))):
        active = [row for row in range(len(scores)) if len(scores[row]) > turn]
        values = [scores[row][turn] for row in active]
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else 0.0
        for row in active:
            advantages[row][turn] = (scores[row][turn] - mean) / (std + 1e-6) if std > 1e-6 else 0.0
    return advantages


def _advantages(scores: list[list[float]], gamma: float, **config: Any) -> list[list[float]]:
    rewards, mask, uids = batch_of(scores, ["q"] * len(scores))
    algorithm = {"siop_reward_mode": "verifiable", "gamma": gamma, **config}
    advantages, _ = compute_siop_advantage(
        token_level_rewards=rewards, response_mask=mask, index=uids, config=algorithm
    )
    return by_turn(advantages, mask)


def test_turn_index_at_gamma_0_is_the_papers_formula() -> None:
    scores = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0], [1.0]]
    found = _advantages(scores, 0.0, siop_baseline="turn_index")
    for one, other in zip(found, _by_hand(scores), strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    # Turn 1: mean 3/4, std 1/2. Turn 3: mean 1/2, std sqrt(1/2).
    assert found[0][0] == pytest.approx(0.5, abs=1e-3) and found[1][0] == pytest.approx(-1.5, abs=1e-3)
    assert found[0][2] == pytest.approx(math.sqrt(0.5), abs=1e-3)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=5), min_size=2, max_size=6))
def test_no_advantage_depends_on_later_turns_at_gamma_0(scores: list[list[float]]) -> None:
    for one, other in zip(_advantages(scores, 0.0, siop_baseline="turn_index"), _by_hand(scores), strict=True):
        assert one == pytest.approx(other, abs=1e-3)
