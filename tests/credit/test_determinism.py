"""The trainer's rewards do not depend on the order of the rows, on their split, or on labels; nor does the update."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import FailingScorer, byte_tokenizer, mixed_batch, query_batch, run
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.siop import scoring
from verl.trainer.siop import trainer as module
from verl.trainer.siop.advantage import compute_siop_advantage
from verl.trainer.siop.trainer import SiopTrainer
from verl.utils.siop.siop_process_reward import SiopConfig
from verl.workers.config import FSDPActorConfig

METHODS: list[dict[str, Any]] = [
    {},
    {"siop_reward_mode": "majority_binary"},
    {"siop_reward_mode": "cluster_frequency"},
    {"siop_reward_mode": "query_consensus"},
    {"siop_reward_mode": "query_consensus", "siop_consensus_terminal": "support"},
]
# Two questions, with sessions past the ninth, so that the order of keys is not that of their text.
ROLLOUTS = {f"{item.uid}_{number + 7}_0": item for number, item in enumerate(mixed_batch() + query_batch())}


def written_rewards(
    monkeypatch: pytest.MonkeyPatch, config: SiopConfig, keys: Sequence[str], label: str = ""
) -> dict[str, torch.Tensor]:
    """The token rewards that the trainer writes for rows that come in the order of ``keys``, padding among them."""
    written: dict[str, torch.Tensor] = {}

    def get(keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, Any]:
        def jagged(rows: list[list[int]]) -> torch.Tensor:
            return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

        rows = [ROLLOUTS[key] for key in keys]
        return {
            "uid": [row.uid for row in rows],
            "prompts": jagged([row.prompt_ids for row in rows]),
            "responses": jagged([row.response_ids for row in rows]),
            "response_mask": jagged([row.response_mask for row in rows]),
            "raw_prompt": [[{"role": "user", "content": row.question}] for row in rows],
            "extra_info": [{} for _ in rows],
            "extra_fields": [{} for _ in rows],
            "reward_model": [{"ground_truth": label} for _ in rows],
        }

    def put(keys: list[str], partition_id: str, fields: Any) -> None:
        written.update(zip(keys, fields["rm_scores"].unbind(), strict=True))

    monkeypatch.setattr(scoring, "ScoringClient", FailingScorer)
    monkeypatch.setattr(module.tq, "kv_batch_get", get)
    monkeypatch.setattr(module.tq, "kv_batch_put", put)
    monkeypatch.setattr(module.SupervisedTrainer, "_compute_advantage", lambda self, batch, metrics: batch)
    trainer = object.__new__(SiopTrainer)
    trainer.siop, trainer.gamma, trainer.scale = config, 1.0, True
    trainer.uses_siop, trainer.tokenizer = True, byte_tokenizer()
    trainer.timing_raw = {}
    tags: list[dict[str, Any]] = [{} for _ in keys]
    batch = SimpleNamespace(keys=[*keys, "pad_0_0"], tags=[*tags, {"is_padding": True}], partition_id="train")
    trainer._compute_advantage(batch, {})  # type: ignore[arg-type]
    return written


def gradient(rewards: dict[str, torch.Tensor], keys: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages, and the gradient of one update of a policy with one logit per token of the vocabulary."""
    pad = torch.nn.utils.rnn.pad_sequence
    rows = [ROLLOUTS[key] for key in keys]
    tokens = pad([torch.tensor(row.response_ids) for row in rows], batch_first=True)
    mask = pad([torch.tensor(row.response_mask) for row in rows], batch_first=True)
    scores = pad([rewards[key] for key in keys], batch_first=True)
    index = np.array([row.uid for row in rows], dtype=object)
    advantages, _ = compute_siop_advantage(scores, mask, index=index)
    logits = torch.zeros(300, requires_grad=True)
    log_prob = torch.log_softmax(logits, dim=0)[tokens]
    loss, _ = get_policy_loss_fn("vanilla")(
        old_log_prob=log_prob.detach(),
        log_prob=log_prob,
        advantages=advantages,
        response_mask=mask.bool(),
        loss_agg_mode="token-mean",
        config=FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1),
    )
    loss.backward()
    assert logits.grad is not None and logits.grad.any()
    return advantages, logits.grad


@pytest.mark.parametrize("keys", METHODS)
def test_the_order_of_the_rows_changes_no_bit(monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> None:
    config, names = SiopConfig(**keys), list(ROLLOUTS)
    first = written_rewards(monkeypatch, config, names)
    advantages, _ = gradient(first, names)
    backwards = np.arange(len(names))[::-1].copy()
    for order in (backwards, *(np.random.default_rng(seed).permutation(len(names)) for seed in range(2))):
        mixed = [names[n] for n in order]
        second = written_rewards(monkeypatch, config, mixed)
        assert all(torch.equal(first[name], second[name]) for name in names)
        assert torch.equal(gradient(second, mixed)[0], advantages[torch.from_numpy(order)])


@pytest.mark.parametrize("keys", METHODS)
def test_every_label_may_change_and_no_reward_advantage_or_gradient_does(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    config, names = SiopConfig(**keys), list(ROLLOUTS)
    right, wrong = (written_rewards(monkeypatch, config, names, label) for label in ("Paris", "x"))
    assert all(torch.equal(right[name], wrong[name]) for name in names)
    for a, b in zip(gradient(right, names), gradient(wrong, names), strict=True):
        assert torch.equal(a, b)


def test_labels_do_change_what_the_mode_that_uses_them_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    config, names = SiopConfig(siop_use_gold_ref=True), list(ROLLOUTS)
    right, wrong = (written_rewards(monkeypatch, config, names, label) for label in ("Paris", "x"))
    assert any(not torch.equal(right[name], wrong[name]) for name in names)


@pytest.mark.parametrize("keys", METHODS)
def test_a_batch_may_be_split_by_question(keys: dict[str, Any]) -> None:
    """Turn rewards bit for bit; advantages too, but for the one scale that leave_one_out takes from its batch."""
    batch = list(ROLLOUTS.values())
    whole = run(batch, **keys)
    for uid in ("a", "b"):
        rows = [n for n, item in enumerate(batch) if item.uid == uid]
        part = run([batch[n] for n in rows], **keys)
        assert part.turn_rewards == [whole.turn_rewards[n] for n in rows]
        assert part.target_mass == [whole.target_mass[n] for n in rows]

    def advantages(rows: list[int], **config: Any) -> torch.Tensor:
        width = max(len(item.response_mask) for item in batch)
        mask, scores = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
        for k, n in enumerate(rows):
            mask[k, : len(batch[n].response_mask)] = torch.tensor(batch[n].response_mask)
        scores += torch.as_tensor(module.place_turn_rewards([whole.turn_rewards[n] for n in rows], mask))
        index = np.array([batch[n].uid for n in rows], dtype=object)
        return compute_siop_advantage(scores, mask, index=index, config=config)[0]

    rows_of = {uid: [n for n, item in enumerate(batch) if item.uid == uid] for uid in ("a", "b")}
    settings: list[dict[str, Any]] = [{"siop_baseline": b} for b in ("pooled", "turn_index", "turn_group")]
    settings += [{"norm_adv_by_std_in_grpo": False}, {"siop_advantage_mode": "broadcast"}]
    for config in settings:
        together = advantages(rows_of["a"] + rows_of["b"], **config)
        assert torch.equal(
            together, torch.cat([advantages(rows_of["a"], **config), advantages(rows_of["b"], **config)])
        )
    together, alone = advantages(rows_of["a"] + rows_of["b"]), advantages(rows_of["a"])
    ratio = (together[: len(alone)] / alone)[alone != 0]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), atol=1e-4)
    assert abs(ratio[0] - 1) > 0.001


def test_rollouts_are_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(ROLLOUTS)
    first, second = (written_rewards(monkeypatch, SiopConfig(), names) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in names)
