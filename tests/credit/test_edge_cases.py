"""Batches that real training meets, through every method and every baseline up to the advantages and metrics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import query_rollout, run, search_rollout
from turn_tensors import by_turn
from verl.trainer.siop.advantage import compute_siop_advantage
from verl.utils.reward_score.siop_reward import place_turn_rewards
from verl.utils.siop.credit.metrics import group_metrics
from verl.utils.siop.credit.registry import BASELINES
from verl.utils.siop.siop_process_reward import GroupRewards, Rollout, SiopConfig
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

METHODS: dict[str, dict[str, Any]] = {
    "siop": {},
    "siop_log": {"siop_gain": "log", "siop_boundary": "assistant"},
    "siop_max": {"siop_evidence": "max", "siop_boundary": "observation"},
    "ttrl": {"siop_reward_mode": "majority_binary"},
    "empo": {"siop_reward_mode": "cluster_frequency"},
    "query_frequency": {"siop_reward_mode": "query_consensus"},
    "query_support": {"siop_reward_mode": "query_consensus", "siop_consensus_terminal": "support"},
    "igpo": {"siop_use_gold_ref": True},
}
ADVANTAGES: list[dict[str, Any]] = [
    *({"siop_baseline": name} for name in BASELINES.names()),
    {"siop_return": "min"},
    {"siop_advantage_mode": "broadcast"},
]
LONG = " ".join(f"word{n}" for n in range(500))
PADDED = Rollout("a", "Q a", [], [0, 0], [0, 0])
BATCHES: dict[str, list[Rollout]] = {
    "nobody answers": [search_rollout("a", None, ["D"]) for _ in range(3)],
    "one answers": [search_rollout("a", answer, ["D"]) for answer in (None, "x", None)],
    "all agree": [query_rollout("a", "x", "q") for _ in range(4)],
    "one rollout": [search_rollout("a", "x", ["D", "E"])],
    "one rollout of one turn": [search_rollout("a", "x")],
    "one turn each": [search_rollout("a", answer) for answer in ("x", "y", "x")],
    "empty answers": [search_rollout("a", answer, ["D"]) for answer in ("", "  ", "x")],
    "an answer of 500 words": [search_rollout("a", answer, ["D"]) for answer in (LONG, "x", LONG)],
    "case and white space": [search_rollout("a", answer, ["D"]) for answer in ("New York", "new  york", "NEW YORK")],
    "non-Latin scripts": [search_rollout("a", answer, ["東京"]) for answer in ("東京", "القاهرة", "Жуков 🙂")],
    "a long observation": [search_rollout("a", answer, ["x" * 5000]) for answer in ("x", "y")],
    "a padded row": [search_rollout("a", "x", ["D"]), PADDED, search_rollout("a", "y", ["D"])],
    "groups of different sizes": [
        search_rollout(uid, f"{n}", ["D"] * n) for uid, size in (("a", 1), ("b", 2), ("c", 3)) for n in range(size)
    ],
}


def advantages_of(batch: list[Rollout], rewards: GroupRewards, **config: Any) -> list[list[float]]:
    mask = torch.nn.utils.rnn.pad_sequence([torch.tensor(item.response_mask) for item in batch], batch_first=True)
    placed = place_turn_rewards(rewards.turn_rewards, mask)
    assert isinstance(placed, torch.Tensor)
    index = np.array([item.uid for item in batch], dtype=object)
    advantages, returns = compute_siop_advantage(placed, mask, index=index, config=config)
    assert torch.isfinite(returns).all()
    return by_turn(advantages, mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BATCHES)
def test_every_method_and_baseline_takes_it(name: str, method: str) -> None:
    batch = [Rollout(**{**vars(item), "gold": ["x"]}) for item in BATCHES[name]]
    rewards = run(batch, **METHODS[method])
    for item, turns in zip(batch, rewards.turn_rewards, strict=True):
        assert len(turns) in (0, len(get_assistant_turn_ranges(item.response_mask)))
        assert all(math.isfinite(reward) for reward in turns)
    found = group_metrics(rewards, batch, SiopConfig(**METHODS[method]))
    assert all(math.isfinite(value) for value in found.values())
    for keys in ADVANTAGES:
        for item, turns in zip(batch, advantages_of(batch, rewards, **keys), strict=True):
            assert len(turns) == len(get_assistant_turn_ranges(item.response_mask))
            assert all(map(math.isfinite, turns))


@pytest.mark.parametrize("keys", ADVANTAGES)
@pytest.mark.parametrize("method", ["ttrl", "empo", "query_frequency"])
def test_a_group_that_agrees_gives_no_update_and_is_counted(method: str, keys: dict[str, Any]) -> None:
    batch = [*BATCHES["all agree"], search_rollout("b", "x", ["D"]), search_rollout("b", "y", ["D"])]
    rewards = run(batch, **METHODS[method])
    assert group_metrics(rewards, batch, SiopConfig())["siop/zero_variance_groups"] >= 0.5
    # One compares different turns of the same rollout, the other a rollout's gains with nothing.
    if keys.get("siop_baseline") not in ("pooled", "trace"):
        assert not np.any(advantages_of(batch, rewards, **keys)[:4])


def test_a_group_that_lost_sessions_is_a_smaller_group() -> None:
    """Nothing remembers how many rollouts were asked for."""
    full = [query_rollout("a", answer, "q", "r") for answer in ("x", "y", "x", "z")]
    assert run(full[:2], **METHODS["empo"]).target_mass == [0.5, 0.5]
    assert run(full, **METHODS["empo"]).target_mass == [0.5, 0.25, 0.5, 0.25]
    assert run(full[:2], **METHODS["query_frequency"]).turn_rewards[0] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith(("igpo", "query"))])
def test_empty_answers_are_no_answers(method: str) -> None:
    rewards = run(BATCHES["empty answers"], **METHODS[method])
    assert rewards.answers == ["", "", "x"]
    assert [bool(turns) for turns in rewards.turn_rewards] == [False, False, True]
