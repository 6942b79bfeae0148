"""The baselines and returns on numbers worked out by hand, and the policy loss that belongs to one of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turn_tensors import batch_of, by_turn
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.siop.advantage import compute_siop_advantage
from verl.trainer.siop.turn_clip import clip_scale, turn_clip_loss
from verl.utils.siop.credit.baselines import Turns, signal
from verl.utils.siop.credit.batch import CreditBatch, gains
from verl.utils.siop.credit.registry import BASELINES, register_baseline
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.siop_process_reward import SiopConfig
from verl.workers.config import FSDPActorConfig

# Two rollouts of three turns, one of two; and a question whose rollouts agree.
REWARDS = [[1.0, 0.0, 3.0], [3.0, 2.0, 1.0], [2.0, 5.0], [4.0], [4.0]]
UIDS = ["a", "a", "a", "b", "b"]


def advantages_of(rewards: list[list[float]], uids: list[str], **keys: Any) -> list[list[float]]:
    rewards_BL, mask_BL, index = batch_of(rewards, uids)
    return by_turn(compute_siop_advantage(rewards_BL, mask_BL, index=index, config=keys)[0], mask_BL)


def test_turn_index_by_hand() -> None:
    # Returns: [4, 3, 3], [6, 3, 1], [7, 5]; by turn: 4 6 7, 3 3 5, 3 1.
    found = advantages_of(REWARDS, UIDS, siop_baseline="turn_index", norm_adv_by_std_in_grpo=False)
    third = 1 / 3
    assert found[0] == pytest.approx([-5 * third, -2 * third, 1.0], abs=1e-6)
    assert found[1] == pytest.approx([third, -2 * third, -1.0], abs=1e-6)
    assert found[2] == pytest.approx([4 * third, 4 * third], abs=1e-6)
    assert found[3] == found[4] == [0.0]
    scaled = advantages_of(REWARDS, UIDS, siop_baseline="turn_index")
    assert scaled[0] == pytest.approx(
        [-5 * third / math.sqrt(7 * third), -2 * third / math.sqrt(4 * third), 1 / math.sqrt(2)], abs=1e-5
    )


def test_turn_index_gives_nothing_to_a_turn_that_one_rollout_alone_reaches() -> None:
    found = advantages_of([[1.0, 9.0], [2.0]], ["a", "a"], siop_baseline="turn_index", norm_adv_by_std_in_grpo=False)
    assert found == [[4.0, 0.0], [-4.0]]


def test_turn_group_by_hand() -> None:
    # Before the last turn: 1 3 2 at turn 1, 0 2 at turn 2; last turns: 3 1 5.
    keys = {"siop_baseline": "turn_group", "norm_adv_by_std_in_grpo": False, "gamma": 0.5, "siop_turn_weight": 2.0}
    found = advantages_of(REWARDS, UIDS, **keys)
    assert found[0] == pytest.approx([2 * (-1 + 0.5 * -1) / math.sqrt(2) + 0, 2 * -1 + 0, 0], abs=1e-6)
    assert found[1] == pytest.approx([2 * (1 + 0.5 * 1) / math.sqrt(2) - 2, 2 * 1 - 2, -2], abs=1e-6)
    assert found[2] == pytest.approx([2 * 0 + 2, 2], abs=1e-6)
    assert found[3] == found[4] == [0.0]
    # Normalised by population deviations: sqrt(2/3) and 1 before the last turn, sqrt(8/3) on the last.
    scaled = advantages_of(REWARDS, UIDS, siop_baseline="turn_group")
    outcome = -2 / math.sqrt(8 / 3)
    assert scaled[1] == pytest.approx(
        [0.3 * (1 / math.sqrt(2 / 3) + 1) / math.sqrt(2) + outcome, 0.3 + outcome, outcome], abs=1e-5
    )


def test_min_form_by_hand() -> None:
    rewards, mask, index = batch_of([[1.0, 0.0, 3.0], [-1.0, 2.0], [5.0]], ["a", "a", "a"])
    config = {"siop_return": "min", "norm_adv_by_std_in_grpo": False}
    advantages, returns = compute_siop_advantage(rewards, mask, index=index, config=config)
    assert by_turn(returns, mask) == [[0.0, 0.0, 3.0], [-1.0, 2.0], [5.0]]
    # Turn 3 is reached by one rollout: minus the siblings' mean full value (-1 + 5) / 2.
    assert by_turn(advantages, mask) == [[-2.0, -2.0, 1.0], [-3.5, 2.0], [5.5]]


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=5), min_size=1, max_size=6))
def test_min_form_is_the_lowest_reward_from_the_turn_on(rewards: list[list[float]]) -> None:
    rewards_BL, mask_BL, index = batch_of(rewards, ["a"] * len(rewards))
    _, returns = compute_siop_advantage(rewards_BL, mask_BL, index=index, config={"siop_return": "min"})
    for got, row in zip(by_turn(returns, mask_BL), rewards, strict=True):
        assert got == pytest.approx([min(row[t:]) for t in range(len(row))], abs=1e-6)


def test_the_return_changes_every_baseline_that_uses_it() -> None:
    for name in ("leave_one_out", "pooled", "turn_index"):
        assert advantages_of(REWARDS, UIDS, siop_baseline=name) != advantages_of(
            REWARDS, UIDS, siop_baseline=name, siop_return="min"
        )


def test_gamma_discounts_every_baseline() -> None:
    for name in ("leave_one_out", "pooled", "turn_index", "turn_group"):
        assert advantages_of(REWARDS, UIDS, siop_baseline=name) != advantages_of(
            REWARDS, UIDS, siop_baseline=name, gamma=0.5
        )


def test_the_turn_weight_changes_turn_group_alone() -> None:
    for name in ("leave_one_out", "pooled", "turn_index", "turn_group"):
        low, high = (advantages_of(REWARDS, UIDS, siop_baseline=name, siop_turn_weight=w) for w in (0.3, 0.6))
        assert (low != high) == (name == "turn_group")
        assert [row[-1] for row in low] == [row[-1] for row in high]


def test_a_baseline_that_returns_something_else_is_refused() -> None:
    def wrong(turns: Turns) -> np.ndarray:
        return turns.returns()[:, :1]

    def infinite(turns: Turns) -> np.ndarray:
        return turns.returns() / 0.0

    for function, message in ((wrong, r"shape \(5, 3\), got shape \(5, 1\)"), (infinite, "not finite")):
        register_baseline("temporary")(function)
        try:
            with pytest.raises(SiopError, match=message), np.errstate(all="ignore"):
                advantages_of(REWARDS, UIDS, siop_baseline="temporary")
        finally:
            del BASELINES._functions["temporary"]
    with pytest.raises(SiopConfigError, match="siop_baseline='temporary'"):
        SiopConfig(siop_baseline="temporary")


# --- the clipping range by turn ---------------------------------------------------------------------------------------


def population_gains(rewards: list[list[float]], t: int) -> list[float | None]:
    """The normalised gain of turn t of each rollout of one question; None where t is its last turn or beyond."""
    peers = [row[t] for row in rewards if len(row) - 1 > t]
    if not peers:
        return [None] * len(rewards)
    mean = sum(peers) / len(peers)
    spread = math.sqrt(sum((x - mean) ** 2 for x in peers) / len(peers) + 1e-8) + 1e-6
    return [(row[t] - mean) / spread if len(row) - 1 > t else None for row in rewards]


@given(
    st.lists(st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=1, max_size=5), min_size=1, max_size=6),
)
def test_the_clip_scale_is_read_back_from_the_advantages(rewards: list[list[float]]) -> None:
    rewards_BL, mask_BL, index = batch_of(rewards, ["a"] * len(rewards))
    advantages, _ = compute_siop_advantage(rewards_BL, mask_BL, index=index, config={"siop_baseline": "turn_group"})
    scales = clip_scale(advantages, mask_BL.bool())
    found = by_turn(scales * mask_BL, mask_BL)
    for t in range(5):
        for row, gain in zip(found, population_gains(rewards, t), strict=True):
            if gain is not None:
                assert row[t] == pytest.approx(1 + 0.3 * math.tanh(gain / 2), abs=1e-4)
    assert [row[-1] for row in found] == [1.0] * len(rewards)


def actor_config(**keys: Any) -> FSDPActorConfig:
    return FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1, **keys)


def test_the_loss_by_hand() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    # Gains 2 and outcome 1: A = 0.3·2 + 1 before the last turn.
    advantages = torch.tensor([[1.6, 1.6, 0.0, 1.0, 0.0], [0.0] * 5])
    new = torch.tensor([[0.4, 0.2, 9.0, -0.1, 9.0], [5.0] * 5], requires_grad=True)
    config = actor_config(clip_ratio_low=0.1, clip_ratio_high=0.2)
    loss, metrics = turn_clip_loss(torch.zeros(2, 5), new, advantages, mask, "token-mean", config, None)
    high = 0.2 * (1 + 0.3 * math.tanh(1.0))
    # The turn's ratio e^0.3 is clipped above for both tokens; e^-0.1 stays within [1 - 0.1, 1 + 0.2].
    assert loss.item() == pytest.approx(-(1.6 * 2 * (1 + high) + math.exp(-0.1)) / 3, abs=1e-5)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(2 / 3, abs=1e-5)
    assert metrics["actor/ppo_kl"] == pytest.approx(-0.5 / 3, abs=1e-5)
    loss.backward()
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([0, 0, 0, -math.exp(-0.1) / 3, 0], abs=1e-6)
    assert not new.grad[1].any()


def test_one_update_per_batch_has_the_gradient_of_the_vanilla_loss() -> None:
    rewards, mask, index = batch_of(REWARDS, UIDS)
    advantages, _ = compute_siop_advantage(rewards, mask, index=index, config={"siop_baseline": "turn_group"})
    gradients = []
    for name in ("turn_clip", "vanilla"):
        new = torch.zeros(mask.shape, requires_grad=True)
        loss, _ = get_policy_loss_fn(name)(
            old_log_prob=torch.zeros(mask.shape),
            log_prob=new,
            advantages=advantages,
            response_mask=mask.bool(),
            loss_agg_mode="token-mean",
            config=actor_config(),
        )
        loss.backward()
        gradients.append(new.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0] is not None and gradients[0].any()


def test_importance_weights_multiply_the_loss() -> None:
    mask, advantages = torch.tensor([[1, 0, 1]]), torch.tensor([[1.0, 0.0, 2.0]])
    zeros, config = torch.zeros(1, 3), actor_config()
    plain, _ = turn_clip_loss(zeros, zeros, advantages, mask, "token-mean", config, None)
    weighted, _ = turn_clip_loss(zeros, zeros, advantages, mask, "token-mean", config, torch.full((1, 3), 0.5))
    assert weighted == plain / 2 == -0.75


# --- agreement up to the scorer's noise


def _noisy(noise: float, disagreeing: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """64 rollouts of three turns, eight questions, equal but for noise; the first questions really differ."""
    rewards = torch.zeros(64, 5)
    drawn = np.random.default_rng(0).normal(0, noise, (64, 3))
    rewards[:, ::2] = torch.tensor(np.array([0.05, 0.9, 0.5]) + drawn, dtype=torch.float32)
    rewards[: 8 * disagreeing : 2, 0] += 0.3
    mask = torch.tensor([[1, 0, 1, 0, 1]] * 64)
    return rewards, mask, np.array([f"q{row // 8}" for row in range(64)], dtype=object)


NORMALISED = [
    {"siop_baseline": "leave_one_out"},
    {"siop_baseline": "turn_index"},
    {"siop_baseline": "turn_group"},
    {"siop_advantage_mode": "broadcast"},
]


@pytest.mark.parametrize("keys", NORMALISED, ids=lambda keys: next(iter(keys.values())))
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-5])
@pytest.mark.parametrize("disagreeing", [0, 2])
def test_noise_of_the_scorer_is_not_scaled_up(keys, noise, disagreeing):
    rewards, mask, uids = _noisy(noise, disagreeing)
    advantages, _ = compute_siop_advantage(rewards, mask, uids, keys)
    assert advantages[8 * disagreeing :].abs().max() < 0.05
    if disagreeing:
        assert advantages[: 8 * disagreeing].pow(2).mean().sqrt() > 0.05
    # The same spread is signal where the scorer has less noise, and more noise is none where it has more.
    if noise and not disagreeing and keys != {"siop_baseline": "turn_group"}:  # that has a floor of its own, 1e-4
        loud, _ = compute_siop_advantage(rewards, mask, uids, {**keys, "siop_scorer_noise": noise / 100})
        assert 0.3 < loud.pow(2).mean().sqrt() < 1.3
        rewards, mask, uids = _noisy(1e-2)
        quiet, _ = compute_siop_advantage(rewards, mask, uids, {**keys, "siop_scorer_noise": 1e-2})
        assert quiet.abs().max() < 0.05


@pytest.mark.parametrize("keys", NORMALISED, ids=lambda keys: next(iter(keys.values())))
def test_what_is_ten_times_the_noise_counts_in_full(keys):
    rewards, mask, uids = _noisy(1e-3)
    with_noise, _ = compute_siop_advantage(rewards, mask, uids, keys)
    without, _ = compute_siop_advantage(rewards, mask, uids, {**keys, "siop_scorer_noise": 0})
    assert torch.equal(with_noise, without)


@pytest.mark.parametrize("gain", ["peak", "prob", "log", "gap"])
@pytest.mark.parametrize("keys", NORMALISED, ids=lambda keys: next(iter(keys.values())))
@pytest.mark.parametrize("log_prob", [-1e-3, -3.0])
def test_noise_of_log_probs_is_no_signal_whatever_the_gain(gain, keys, log_prob):
    config = SiopConfig(siop_gain=gain, **keys)
    support = np.exp(log_prob + np.random.default_rng(0).normal(0, 1e-5, (64, 4)))
    rewards, mask, uids = _noisy(0)
    rewards[:, ::2] = torch.tensor([gains(row, config) for row in support.tolist()])
    advantages, _ = compute_siop_advantage(rewards, mask, uids, {"siop_gain": gain, **keys})
    assert advantages.abs().max() < 0.05


@pytest.mark.parametrize("keys", NORMALISED, ids=lambda keys: next(iter(keys.values())))
@pytest.mark.parametrize("mode", ["verifiable", "majority_binary", "cluster_frequency", "query_consensus"])
def test_exact_rewards_have_no_noise(mode, keys):
    rewards, mask, uids = _noisy(0.05)
    exact = {"siop_reward_mode": mode, **keys}
    loud, _ = compute_siop_advantage(rewards, mask, uids, {**exact, "siop_scorer_noise": 1.0})
    plain, _ = compute_siop_advantage(rewards, mask, uids, {**exact, "siop_scorer_noise": 0.0})
    assert torch.equal(loud, plain) and plain.any()


def test_signal():
    np.testing.assert_allclose(signal(np.array([0.0, 1e-5, 5e-5, 7.5e-5, 1e-4, 1.0]), 1e-5), [0, 0, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(signal(np.array([0.0, 1.0]), 0.0), [1, 1])


# --- TRACE


def _trace_by_the_paper(log_probs: list[list[float]], outcomes: list[float], gamma: float, weight: float) -> list:
    """Algorithm 1 for one question: log_probs[rollout][boundary], one more than tool calls."""
    mean = sum(outcomes) / len(outcomes)
    sigma = math.sqrt(sum((outcome - mean) ** 2 for outcome in outcomes) / len(outcomes))
    found = []
    for values, outcome in zip(log_probs, outcomes, strict=True):
        out = (outcome - mean) / sigma
        gaps = [-value + 0.1 for value in values]
        deltas = [math.log(before / after) for before, after in itertools.pairwise(gaps)]
        rows = []
        for t in range(len(deltas)):
            window = deltas[t : t + 3]
            weights = [gamma**j for j in range(len(window))]
            credit = sum(w * d for w, d in zip(weights, window, strict=True)) / sum(weights)
            if t + 3 >= len(deltas):
                credit += 2.0 * gamma ** (len(deltas) - t) * out
            rows.append(out + weight * credit)
        found.append([*rows, out])
    return found


@settings(max_examples=50)
@given(st.data())
def test_trace_is_that_of_the_paper(data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.lists(st.floats(-20, -0.01), min_size=1, max_size=7), min_size=2, max_size=5))
    outcomes = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(drawn), max_size=len(drawn)))
    if len(set(outcomes)) == 1:
        outcomes[0] = 1.5
    config = SiopConfig(siop_use_gold_ref=True, siop_gain="gap", siop_boundary="observation", siop_baseline="trace")
    batch = CreditBatch([], None, config, None)  # type: ignore[arg-type]
    # p at the prompt and after each search; the last boundary equals the one before, so the last turn has no gain.
    supports = [[math.exp(value) for value in [*values, values[-1]]] for values in drawn]
    rewards = [[*batch.gains(support)[:-1], outcome] for support, outcome in zip(supports, outcomes, strict=True)]
    keys = {"siop_baseline": "trace", "siop_turn_weight": 0.2, "gamma": 0.8}
    found = advantages_of(rewards, ["a"] * len(drawn), **keys)
    for ours, paper in zip(found, _trace_by_the_paper(drawn, outcomes, 0.8, 0.2), strict=True):
        assert ours == pytest.approx(paper, abs=1e-4)


@pytest.mark.parametrize("keys", [{"siop_baseline": "trace"}, {"siop_baseline": "turn_group"}])
def test_f1_has_none_of_the_scorers_noise(keys: dict[str, Any]) -> None:
    # One rollout of eight is right in part; the scorer is as noisy as one in bf16.
    rewards = [[0.0, 0.0, 0.4 * (row == 0)] for row in range(8)]
    keys = {"siop_use_gold_ref": True, "siop_gain": "gap", "siop_boundary": "observation", **keys}
    exact = advantages_of(rewards, ["a"] * 8, siop_scorer_noise=0.0, **keys)
    assert advantages_of(rewards, ["a"] * 8, siop_scorer_noise=3e-3, **keys) == exact
    assert exact[0][-1] == pytest.approx(math.sqrt(7), abs=1e-3)
    # Without a gold reference the last turn has a gain in its reward, and so the noise.
    rewards = [[0.0, 0.0, 1e-3 * (row == 0)] for row in range(8)]
    found = advantages_of(rewards, ["a"] * 8, siop_scorer_noise=3e-3, siop_baseline=keys["siop_baseline"])
    assert found == [[0.0] * 3] * 8


def test_trace_refuses_another_return() -> None:
    with pytest.raises(SiopConfigError, match="siop_return='min' is not allowed with siop_baseline='trace'"):
        SiopConfig(siop_baseline="trace", siop_return="min")
