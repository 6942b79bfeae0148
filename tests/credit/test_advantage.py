"""The ``siop`` estimator: golden numbers, a plain definition to compare with, unbiasedness, order, padding."""

from __future__ import annotations

import importlib
import math
from statistics import fmean, pvariance, stdev
from typing import Any

import numpy as np
import pytest
import torch
import verl  # noqa: F401  (loads the plugin that registers the estimator)
from golden_cases import GoldenScorer, golden, golden_rollouts
from hypothesis import given
from hypothesis import strategies as st
from method_helpers import mixed_batch, run
from omegaconf import OmegaConf
from turn_tensors import batch_of, by_turn
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn
from verl.trainer.siop import advantage as module
from verl.trainer.siop.advantage import AdvantageInputError, compute_siop_advantage
from verl.utils.reward_score.siop_reward import place_turn_rewards
from verl.utils.siop.credit.baselines import Turns
from verl.utils.siop.credit.registry import BASELINES
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.siop_process_reward import SiopConfig
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

from benchmarks.credit_bias import EXAMPLE, Chain

TOLERANCE = 1e-5


# --- golden numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(golden("advantage.json"))))
def test_golden_advantages(number: int) -> None:
    case = golden("advantage.json")[number]
    advantages, _ = compute_siop_advantage(
        token_level_rewards=torch.tensor(case["rewards"]),
        response_mask=torch.tensor(case["mask"]),
        index=np.array(case["index"], dtype=object),
        config=OmegaConf.create({"siop_baseline": "pooled", "gamma": 0.123}),
        gamma=case["gamma"],
        norm_adv_by_std_in_grpo=case["norm_adv_by_std_in_grpo"],
    )
    torch.testing.assert_close(advantages, torch.tensor(case["advantages"]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("number", range(len(golden("pipeline.json"))))
@pytest.mark.parametrize(
    ("setting", "keys"),
    [
        ("default", {}),
        ("g9", {"gamma": 0.9}),
        ("nostd", {"norm_adv_by_std_in_grpo": False}),
        ("broadcast", {"siop_advantage_mode": "broadcast"}),
        ("broadcast", {"siop_enable_two_pass": False}),
    ],
)
def test_golden_pipeline_up_to_the_advantages(number: int, setting: str, keys: dict[str, Any]) -> None:
    case = golden("pipeline.json")[number]
    rollouts = golden_rollouts(case)
    rewards = run(rollouts, GoldenScorer(case), **case["config"])
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.tensor(rollout.response_mask) for rollout in rollouts], batch_first=True)
    advantages, _ = compute_siop_advantage(
        token_level_rewards=place_turn_rewards(rewards.turn_rewards, mask),
        response_mask=mask,
        index=np.array([rollout.uid for rollout in rollouts], dtype=object),
        config={"siop_baseline": "pooled", **keys},
    )
    for got, want in zip(by_turn(advantages, mask), case["expected"]["advantages"][setting], strict=True):
        assert got == pytest.approx(want, abs=TOLERANCE)


# --- the definition, turn by turn -------------------------------------------------------------------------------------


def return_to_go(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]


def plain_pooled(turn_rewards: list[list[float]], uids: list[str], gamma: float, scale: bool) -> list[list[float]]:
    result = []
    for rewards, uid in zip(turn_rewards, uids, strict=True):
        pool = [r for other, name in zip(turn_rewards, uids, strict=True) if name == uid for r in other]
        if len(pool) <= 1:
            result.append([0.0] * len(rewards))
            continue
        spread = stdev(pool) if scale else 1.0
        spread = 1.0 if spread < 1e-6 else spread
        centred = [(r - fmean(pool)) / (spread + 1e-6 if scale else 1.0) for r in rewards]
        result.append(return_to_go(centred, gamma))
    return result


def plain_leave_one_out(
    turn_rewards: list[list[float]], uids: list[str], gamma: float, scale: bool
) -> list[list[float]]:
    returns = [return_to_go(rewards, gamma) for rewards in turn_rewards]
    result: list[list[float]] = []
    for i, own in enumerate(returns):
        siblings = [returns[j] for j in range(len(returns)) if j != i and uids[j] == uids[i] and returns[j]]
        row = []
        for t, value in enumerate(own):
            reached = [other[t] for other in siblings if len(other) > t] or [other[0] for other in siblings]
            row.append(value - fmean(reached) if reached else 0.0)
        result.append(row)
    flat = [value for row in result for value in row]
    if scale and len(flat) > 1:
        spread = stdev(flat) + 1e-6
        result = [[value / spread for value in row] for row in result]
    return result


def plain_turn_index(turn_rewards: list[list[float]], uids: list[str], gamma: float, scale: bool) -> list[list[float]]:
    returns = [return_to_go(rewards, gamma) for rewards in turn_rewards]
    result = []
    for own, uid in zip(returns, uids, strict=True):
        row = []
        for t, value in enumerate(own):
            peers = [other[t] for other, name in zip(returns, uids, strict=True) if name == uid and len(other) > t]
            spread = stdev(peers) if scale and len(peers) > 1 else 1.0
            spread = 1.0 if spread < 1e-6 else spread
            row.append((value - fmean(peers)) / (spread + 1e-6 if scale else 1.0))
        result.append(row)
    return result


def plain_turn_group(turn_rewards: list[list[float]], uids: list[str], gamma: float, scale: bool) -> list[list[float]]:
    def normalised(value: float, peers: list[float]) -> float:
        return (value - fmean(peers)) / (math.sqrt(pvariance(peers) + 1e-8) + 1e-6 if scale else 1.0)

    result: list[list[float]] = []
    for own, uid in zip(turn_rewards, uids, strict=True):
        group = [other for other, name in zip(turn_rewards, uids, strict=True) if name == uid and other]
        gains = [normalised(r, [other[t] for other in group if len(other) - 1 > t]) for t, r in enumerate(own[:-1])]
        outcome = normalised(own[-1], [other[-1] for other in group]) if own else 0.0
        sums = [value / math.sqrt(len(gains) - t) for t, value in enumerate(return_to_go(gains, gamma))]
        result.append([0.3 * value + outcome for value in sums] + [outcome] * bool(own))
    return result


def plain_trace(turn_rewards: list[list[float]], uids: list[str], gamma: float, scale: bool) -> list[list[float]]:
    result: list[list[float]] = []
    for own, uid in zip(turn_rewards, uids, strict=True):
        peers = [other[-1] for other, name in zip(turn_rewards, uids, strict=True) if name == uid and other]
        spread = math.sqrt(pvariance(peers) + 1e-8) + 1e-6 if scale and peers else 1.0
        outcome, gains = (own[-1] - fmean(peers)) / spread if own else 0.0, own[:-1]
        row = []
        for t in range(len(gains)):
            window, left = gains[t : t + 3], len(gains) - t
            weights = [gamma**j for j in range(len(window))]
            credit = sum(w * r for w, r in zip(weights, window, strict=True)) / sum(weights)
            row.append(outcome + 0.3 * (credit + (2 * gamma**left * outcome if left <= 3 else 0.0)))
        result.append(row + [outcome] * bool(own))
    return result


PLAIN = {
    "pooled": plain_pooled,
    "leave_one_out": plain_leave_one_out,
    "turn_index": plain_turn_index,
    "turn_group": plain_turn_group,
    "trace": plain_trace,
}
BASELINE_NAMES = BASELINES.names()

# Rewards of a coarse grid, so that no standard deviation is a rounding error of one.
batches = st.lists(
    st.tuples(st.sampled_from(["q1", "q2", "q3"]), st.lists(st.integers(-8, 8).map(lambda n: n / 4), max_size=5)),
    min_size=1,
    max_size=10,
)


@given(batches, st.sampled_from(BASELINE_NAMES), st.sampled_from([1.0, 0.9, 0.0]), st.booleans())
def test_the_estimator_equals_its_definition(
    batch: list[tuple[str, list[float]]], baseline: str, gamma: float, scale: bool
) -> None:
    uids, turn_rewards = [uid for uid, _ in batch], [rewards for _, rewards in batch]
    rewards_BL, mask_BL, index = batch_of(turn_rewards, uids)
    config = {"siop_baseline": baseline, "gamma": gamma, "norm_adv_by_std_in_grpo": scale}
    advantages, returns = compute_siop_advantage(rewards_BL, mask_BL, index=index, config=config)
    assert advantages.dtype == returns.dtype == torch.float32
    for got, want in zip(by_turn(advantages, mask_BL), PLAIN[baseline](turn_rewards, uids, gamma, scale), strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    for got, rewards in zip(by_turn(returns, mask_BL), turn_rewards, strict=True):
        assert got == pytest.approx(return_to_go(rewards, gamma), abs=1e-5)


@given(
    st.lists(st.tuples(st.sampled_from(["q1", "q2"]), st.lists(st.floats(-3, 3), max_size=4)), min_size=1, max_size=10),
    st.sampled_from([*BASELINE_NAMES, "broadcast"]),
    st.randoms(use_true_random=False),
)
def test_row_order_and_padding_change_no_bit(batch: list[tuple[str, list[float]]], what: str, random: Any) -> None:
    config = {"siop_advantage_mode": what} if what == "broadcast" else {"siop_baseline": what}
    rewards_BL, mask_BL, index = batch_of([rewards for _, rewards in batch], [uid for uid, _ in batch])
    first = compute_siop_advantage(rewards_BL, mask_BL, index=index, config=config)

    order = list(range(len(batch)))
    random.shuffle(order)
    width = rewards_BL.shape[1] + 7
    rewards, mask, uids = batch_of([batch[n][1] for n in order], [batch[n][0] for n in order], width)
    # Padding rows, also with a reward and a uid of their own or of a question.
    rewards = torch.cat([rewards, torch.ones(2, width, dtype=torch.float64)])
    mask = torch.cat([mask, torch.zeros(2, width, dtype=torch.int64)])
    second = compute_siop_advantage(rewards, mask, index=np.append(uids, ["q1", "pad"]), config=config)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[order], b[: len(batch), : a.shape[1]])
        assert not b[len(batch) :].any()
        assert not b[:, a.shape[1] :].any()


@pytest.mark.parametrize("baseline", BASELINE_NAMES)
def test_row_order_changes_no_bit_before_rounding_either(baseline: str) -> None:
    """Single precision hides nearly all differences in the order of a sum; double precision does not."""
    rng = np.random.default_rng(0)
    reached = np.arange(5)[None, :] < rng.integers(1, 6, size=32)[:, None]
    rewards, groups = rng.normal(size=(32, 5)) * reached, np.arange(32) % 4

    def estimate(order: np.ndarray) -> np.ndarray:
        config = SiopConfig(siop_baseline=baseline)
        return module._advantages(Turns(rewards[order], reached[order], groups[order], 0.9, True, config))

    first = estimate(np.arange(32))
    assert first.dtype == np.float64
    for _ in range(5):
        order = rng.permutation(32)
        assert np.array_equal(estimate(order), first[order])


# --- unbiasedness -----------------------------------------------------------------------------------------------------

# A z-test for each logit: an unbiased estimate is further than 4.5 standard errors from the exact value with
# probability 7e-6.
Z = 4.5


def test_the_exact_gradient_of_the_chain() -> None:
    assert EXAMPLE.exact_gradient().round(3).tolist() == [0.182, 0.077, 0.009]


def test_leave_one_out_is_unbiased_and_pooled_turns_the_sign() -> None:
    estimate, error = EXAMPLE.estimated_gradient("leave_one_out", K=8, groups=20_000, seed=0)
    assert error.max() < 1e-3
    assert np.all(np.abs(estimate - EXAMPLE.exact_gradient()) < Z * error)

    estimate, error = EXAMPLE.estimated_gradient("pooled", K=8, groups=20_000, seed=0)
    assert np.all(estimate < -10 * error)  # the exact gradient is positive at every turn


@pytest.mark.parametrize("seed", range(8))
def test_in_random_chains_leave_one_out_is_unbiased_and_pooled_is_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chain, K = Chain.random(rng, turns=int(rng.integers(2, 7))), int(rng.integers(2, 9))
    exact = chain.exact_gradient()
    estimate, error = chain.estimated_gradient("leave_one_out", K, groups=20_000, seed=seed)
    assert error.max() < 0.02
    assert np.all(np.abs(estimate - exact) < Z * error)
    estimate, error = chain.estimated_gradient("pooled", K, groups=20_000, seed=seed)
    assert np.any(np.abs(estimate - exact) > Z * error)


def test_turn_index_keeps_the_sign_and_shrinks() -> None:
    exact = EXAMPLE.exact_gradient()
    estimate, error = EXAMPLE.estimated_gradient("turn_index", K=8, groups=20_000, seed=0)
    assert np.all(estimate > Z * error) and np.all(estimate < exact - Z * error)


# --- variants and edge cases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("key", [{"siop_advantage_mode": "broadcast"}, {"siop_enable_two_pass": False}])
def test_broadcast_is_verls_grpo(key: dict[str, Any], scale: bool) -> None:
    rewards, mask, index = batch_of([[0.1, 0.9], [0.3], [1.0, -0.5, 0.2], [0.7], [0.4, 0.4]], ["a", "a", "b", "b", "c"])
    expected, _ = compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=scale)
    for baseline in ("pooled", "leave_one_out"):  # changes nothing here
        config = {**key, "siop_baseline": baseline, "gamma": 0.5, "norm_adv_by_std_in_grpo": scale}
        advantages, returns = compute_siop_advantage(rewards, mask, index=index, config=config)
        torch.testing.assert_close(advantages, expected.to(torch.float32), atol=1e-6, rtol=0)
        assert torch.equal(advantages, returns)


def test_the_default_is_leave_one_out_with_one_scale_for_the_batch() -> None:
    turn_rewards, uids = [[1.0, 2.0], [0.5], [10.0], [30.0]], ["a", "a", "b", "b"]
    rewards, mask, index = batch_of(turn_rewards, uids)
    configs: list[Any] = [None, {}, OmegaConf.create({"gamma": 1.0}), AlgoConfig()]
    for config in configs:
        advantages, _ = compute_siop_advantage(rewards, mask, index=index, config=config)
        expected = plain_leave_one_out(turn_rewards, uids, 1.0, True)
        for got, want in zip(by_turn(advantages, mask), expected, strict=True):
            assert got == pytest.approx(want, abs=1e-6)
    # The question with larger rewards keeps its larger advantages.
    assert advantages[3].max() > 5 * advantages[0].max()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("siop_reward_mode", "cluster_frequency"),
        ("siop_use_gold_ref", True),
        ("siop_boundary", "assistant"),
        ("siop_gain", "log"),
        ("siop_gain", "prob"),
        ("siop_lambda", 0.0),
        ("siop_vote", "informed"),
        ("siop_eta", 0.0),
        ("siop_evidence", "max"),
        ("siop_num_refs", 1),
        ("siop_epsilon", 0.1),
        ("siop_consensus_terminal", "support"),
        ("siop_strict_entailment", False),
        ("siop_reference_prefix", "x"),
        ("siop_reference_suffix", "x"),
        ("siop_turn_weight", 1.0),  # of another baseline
    ],
)
def test_keys_of_other_stages_change_no_advantage(key: str, value: Any) -> None:
    rewards, mask, index = batch_of([[1.0, 2.0], [0.5], [10.0], [30.0]], ["a", "a", "b", "b"])
    plain, other = (compute_siop_advantage(rewards, mask, index=index, config=c) for c in ({}, {key: value}))
    assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])


def test_no_sibling_reached_the_turn() -> None:
    rewards, mask, index = batch_of([[1.0, 2.0, 4.0], [0.5, 0.25], [3.0]], ["a", "a", "a"])
    advantages, _ = compute_siop_advantage(rewards, mask, index=index, norm_adv_by_std_in_grpo=False)
    assert by_turn(advantages, mask)[0] == pytest.approx([7 - (0.75 + 3) / 2, 6 - 0.25, 4 - (0.75 + 3) / 2])


def test_explicit_arguments_win_over_the_section() -> None:
    rewards, mask, index = batch_of([[1.0, 2.0], [0.5]], ["a", "a"])
    section = {"gamma": 0.0, "norm_adv_by_std_in_grpo": True}
    explicit = compute_siop_advantage(
        rewards, mask, index=index, config=section, gamma=1.0, norm_adv_by_std_in_grpo=False
    )
    assert by_turn(explicit[0], mask) == [[2.5, 1.5], [-2.5]]
    from_section, _ = compute_siop_advantage(rewards, mask, index=index, config={**section, "siop_baseline": "pooled"})
    assert by_turn(from_section, mask)[0][1] > by_turn(from_section, mask)[0][0]


@pytest.mark.parametrize("baseline", BASELINE_NAMES)
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_exactly_zero(baseline: str, scale: bool) -> None:
    rewards, mask, index = batch_of([[0.1], [0.1], [0.1], [0.7], [0.7], [0.7]], ["a"] * 3 + ["b"] * 3)
    config = {"siop_baseline": baseline, "norm_adv_by_std_in_grpo": scale}
    assert not compute_siop_advantage(rewards, mask, index=index, config=config)[0].any()


@pytest.mark.parametrize("baseline", BASELINE_NAMES)
def test_a_question_with_one_rollout_of_one_turn(baseline: str) -> None:
    rewards, mask, index = batch_of([[5.0], [1.0], [2.0]], ["alone", "b", "b"])
    config = {"siop_baseline": baseline}
    advantages, returns = compute_siop_advantage(rewards, mask, index=index, config=config)
    assert not advantages[0].any()
    assert by_turn(returns, mask)[0] == [5.0]
    assert advantages[1:].any()


def test_a_question_with_one_rollout_has_no_leave_one_out_baseline() -> None:
    rewards, mask, index = batch_of([[5.0, 1.0, 3.0]], ["alone"])
    assert not compute_siop_advantage(rewards, mask, index=index)[0].any()


@pytest.mark.parametrize("keys", [*({"siop_baseline": n} for n in PLAIN), {"siop_advantage_mode": "broadcast"}])
def test_a_batch_of_padding_only(keys: dict[str, Any]) -> None:
    zeros = torch.zeros(2, 5)
    advantages, returns = compute_siop_advantage(zeros + 1, zeros, index=np.array(["a", "a"]), config=keys)
    assert torch.equal(advantages, zeros)
    assert torch.equal(returns, zeros)


def test_token_rewards_inside_a_turn_and_after_it_count_for_the_turn() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 0, 0]])
    rewards = torch.tensor([[9.0, 1.0, 2.0, 4.0, 0.0, 8.0], [0.0] * 6])
    _, returns = compute_siop_advantage(rewards, mask, index=np.array(["a", "a"]))
    assert returns[0].tolist() == [0, 15, 15, 0, 0, 8]


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=8), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_turns_at_the_edges_of_their_rows(masks: list[list[int]], random: Any) -> None:
    """Rewards are whole numbers, so the returns are exact: each token against the definition, bit for bit."""
    rewards = [[random.randint(-9, 9) for _ in mask] for mask in masks]
    expected = torch.zeros(len(masks), 8)
    for row, mask in enumerate(masks):
        for start, end in get_assistant_turn_ranges(mask):
            expected[row, start:end] = sum(rewards[row][start:])
    _, returns = compute_siop_advantage(
        torch.tensor(rewards, dtype=torch.float32), torch.tensor(masks), index=np.array(["a"] * len(masks))
    )
    assert torch.equal(returns, expected)


def test_the_inputs_stay_as_they_are() -> None:
    rewards, mask, index = batch_of([[1.0, 2.0], [0.5]], ["a", "a"])
    before = rewards.clone(), mask.clone()
    for keys in ({}, {"siop_baseline": "pooled"}, {"siop_advantage_mode": "broadcast"}):
        compute_siop_advantage(rewards, mask, index=index, config=keys)
    assert torch.equal(rewards, before[0])
    assert torch.equal(mask, before[1])


def test_what_the_method_gives_is_what_the_update_gets() -> None:
    """EMPO and TTRL reward only the last turn, so with gamma 1 every turn of a rollout has the same return."""
    batch = mixed_batch()
    rewards = run(batch, siop_reward_mode="cluster_frequency")
    masks = [torch.tensor(item.response_mask) for item in batch]
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    index = np.array([item.uid for item in batch], dtype=object)
    _, returns = compute_siop_advantage(place_turn_rewards(rewards.turn_rewards, mask), mask, index=index)
    for turns, mass in zip(by_turn(returns, mask), rewards.target_mass, strict=True):
        assert set(turns) == {mass}


def test_bad_input_is_named() -> None:
    rewards, mask, index = batch_of([[1.0], [2.0]], ["a", "a"])
    with pytest.raises(AdvantageInputError, match="uids"):
        compute_siop_advantage(rewards, mask)
    with pytest.raises(AdvantageInputError, match=r"\(2, 2\).*index 1"):
        compute_siop_advantage(rewards, mask, index=index[:1])
    with pytest.raises(SiopConfigError, match=r"siop_basline.*siop_baseline"):
        compute_siop_advantage(rewards, mask, index=index, config={"siop_basline": "pooled"})
    with pytest.raises(SiopConfigError, match=r"siop_baseline='none'.*leave_one_out, pooled"):
        compute_siop_advantage(rewards, mask, index=index, config={"siop_baseline": "none"})
    for gamma in (None, -1.0, math.inf, math.nan, "1"):
        with pytest.raises(SiopConfigError, match=f"gamma={gamma!r} is not allowed"):
            compute_siop_advantage(rewards, mask, index=index, config={"gamma": gamma})
    for scale in (None, "false", 2):
        with pytest.raises(
            SiopConfigError, match=f"norm_adv_by_std_in_grpo={scale!r} is not allowed; choose true or f"
        ):
            compute_siop_advantage(rewards, mask, index=index, config={"norm_adv_by_std_in_grpo": scale})


@pytest.mark.parametrize("value", [math.nan, 0.5, 2.0, -1.0])
def test_a_mask_of_other_numbers_than_0_and_1_is_refused(value: float) -> None:
    rewards, mask, index = batch_of([[1.0, 2.0], [2.0, 0.5]], ["a", "a"])
    mask = mask.to(torch.float32)
    mask[1, 0] = value
    with pytest.raises(AdvantageInputError, match="response_mask holds numbers other than 0 and 1"):
        compute_siop_advantage(rewards, mask, index=index)


@pytest.mark.parametrize("keys", [{}, {"siop_advantage_mode": "broadcast"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool])
def test_tensors_of_any_precision_are_taken(dtype: torch.dtype, keys: dict[str, Any]) -> None:
    rewards, mask, index = batch_of([[1.0, 2.0], [2.0, 0.5], [4.0]], ["a", "a", "a"])
    expected = compute_siop_advantage(rewards, mask, index=index, config=keys)
    given = rewards if dtype == torch.bool else rewards.to(dtype)
    found = compute_siop_advantage(given, mask.to(dtype), index=index, config=keys)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs)
    placed = place_turn_rewards([[1.0, 2.0], [3.0]], torch.tensor([[1, 0, 1], [1, 1, 0]]).to(dtype))
    assert isinstance(placed, torch.Tensor) and placed.tolist() == [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "keys",
    [
        *({"siop_baseline": name} for name in PLAIN),
        {"siop_advantage_mode": "broadcast"},
        {"siop_enable_two_pass": False},
    ],
)
def test_rewards_that_are_not_finite_are_refused(keys: dict[str, Any], value: float) -> None:
    rewards, mask, index = batch_of([[1.0, 2.0], [2.0, 0.5], [4.0]], ["a", "a", "a"])
    expected = compute_siop_advantage(rewards, mask, index=index, config=keys)
    broken = rewards.to(torch.float32)
    broken[1, -1] = value
    with pytest.raises(AdvantageInputError, match="not finite in row 1"):
        compute_siop_advantage(broken, mask, index=index, config=keys)
    # Padding counts nowhere.
    rewards = torch.cat([rewards, torch.full_like(rewards[:1], value)])
    mask = torch.cat([mask, torch.zeros_like(mask[:1])])
    padded = compute_siop_advantage(rewards, mask, index=np.append(index, "a"), config=keys)
    assert all(torch.equal(with_padding[:3], without) for with_padding, without in zip(padded, expected, strict=True))


def test_it_is_registered_and_loading_it_again_is_harmless() -> None:
    assert get_adv_estimator_fn("siop") is module.compute_siop_advantage
    again = importlib.reload(module)
    assert get_adv_estimator_fn("siop") is again.compute_siop_advantage


def test_another_estimator_of_that_name_is_not_replaced() -> None:
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    def foreign() -> None: ...

    own = ADV_ESTIMATOR_REGISTRY["siop"]
    ADV_ESTIMATOR_REGISTRY["siop"] = foreign  # type: ignore[assignment]
    try:
        with pytest.raises(ValueError, match="already been registered"):
            importlib.reload(module)
    finally:
        ADV_ESTIMATOR_REGISTRY["siop"] = own


def test_verls_trainer_calls_it() -> None:
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    rewards, mask, index = batch_of([[1.0, 2.0], [0.5]], ["a", "a"])
    data = DataProto.from_dict({"token_level_rewards": rewards, "response_mask": mask}, non_tensors={"uid": index})
    section = {"gamma": 1.0, "norm_adv_by_std_in_grpo": False, "siop_baseline": "leave_one_out"}
    arguments: dict[str, Any] = {"adv_estimator": "siop", "config": OmegaConf.create(section)}  # as verl's trainer does
    result = compute_advantage(data, **arguments)
    assert by_turn(result.batch["advantages"], mask) == [[2.5, 1.5], [-2.5]]
