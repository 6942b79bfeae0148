"""The trainer's own decisions: which rows are scored, what happens when the scorer fails, what the question is."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch
from method_helpers import FailingScorer, byte_tokenizer, search_rollout
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.siop import scoring
from verl.trainer.siop import trainer as module
from verl.trainer.siop.rollouts.alarms import NothingLearnt
from verl.trainer.siop.rollouts.rows import question_of, session_of
from verl.trainer.siop.rollouts.tool_calls import ToolRecord
from verl.trainer.siop.trainer import SiopTrainer, _jagged
from verl.utils.siop.errors import ScorerError, SiopError
from verl.utils.siop.siop_process_reward import Rollout, SiopConfig

ROLLOUTS = [search_rollout(uid, answer, ["x is here"]) for uid in ("a", "b", "c") for answer in ("x", "y")]


def _trainer(monkeypatch: pytest.MonkeyPatch, bad: tuple[str, ...], **keys: Any) -> SiopTrainer:
    trainer = object.__new__(SiopTrainer)
    trainer.siop, trainer.gamma, trainer.scale = SiopConfig(**keys), 1.0, True
    trainer.tokenizer = byte_tokenizer()
    monkeypatch.setattr(scoring, "ScoringClient", FailingScorer)
    monkeypatch.setattr(FailingScorer, "bad", bad)
    return trainer


class Actor:
    """An actor whose log-probs are all -1, but not numbers for the sequences of one question."""

    def __init__(self, bad: str) -> None:
        self.bad = byte_tokenizer()(f"Q {bad}<|im_end|>")["input_ids"]

    def _query_dispatch_info(self, mesh: str) -> list[int]:
        return [0]

    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        bad, rows = torch.tensor(self.bad), data["input_ids"].unbind()
        log_probs = [
            torch.full(row.shape, float("nan") if (row.unfold(0, len(bad), 1) == bad).all(1).any() else -1.0)
            for row in rows
        ]
        return TensorDict({"log_probs": torch.nested.as_nested_tensor(log_probs, layout=torch.jagged)}, [len(rows)])


def test_support_comes_from_the_policy_or_the_question_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(monkeypatch, (), siop_scorer="policy", siop_on_scorer_error="drop_group")
    rollout = {"log_prob_use_dynamic_bsz": True, "log_prob_max_token_len_per_gpu": 1000}
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})
    trainer.actor_rollout_wg = Actor(bad="c")
    scores = asyncio.run(trainer._score_batch(ROLLOUTS))
    assert scores.dropped == {"c"} and scores.rows == [0, 1, 2, 3]
    assert scores.rewards.support == [[pytest.approx(math.exp(-1))] * 3] * 4
    assert scores.cost["siop/seconds/support"] > 0
    assert scores.cost["siop/tokens/requested"] > scores.cost["siop/tokens/computed"] > 0
    trainer.siop = SiopConfig(siop_scorer="policy")
    with pytest.raises(ScorerError, match="the actor gave no finite log-prob"):
        asyncio.run(trainer._score_batch(ROLLOUTS))


class RoundingActor(Actor):
    """An actor whose log-probs are a little higher where it scores several sequences at once."""

    def __init__(self, noise: float) -> None:
        super().__init__(bad="nobody")
        self.noise, self.calls = noise, 0

    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        self.calls += 1
        rows = super().compute_log_prob(data)["log_probs"].unbind()
        values = [row + self.noise * (len(rows) > 1) for row in rows]
        return TensorDict({"log_probs": torch.nested.as_nested_tensor(values, layout=torch.jagged)}, [len(rows)])


@pytest.mark.parametrize(
    ("measured", "keys", "counts"),
    [
        (0.0, {}, 1e-5),
        (4e-3, {}, 4e-3),
        (4e-3, {"siop_scorer_noise": 0.1}, 0.1),
        (4e-3, {"siop_reward_mode": "cluster_frequency"}, 1e-5),
    ],
)
def test_the_noise_of_the_policy_as_scorer_is_measured_once(
    measured: float,
    keys: dict[str, Any],
    counts: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = _trainer(monkeypatch, (), siop_scorer="policy", **keys)
    rollout = {"log_prob_use_dynamic_bsz": True, "log_prob_max_token_len_per_gpu": 1000}
    algorithm = {"siop_scorer": "policy", "siop_scorer_noise": 1e-5, **keys}
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "algorithm": algorithm})
    trainer.actor_rollout_wg = RoundingActor(measured)
    first = asyncio.run(trainer._score_batch(ROLLOUTS))
    calls = trainer.actor_rollout_wg.calls
    again = asyncio.run(trainer._score_batch(ROLLOUTS))
    # The estimator, the metrics.
    assert trainer.config.algorithm.siop_scorer_noise == pytest.approx(counts, rel=1e-4)
    assert trainer.siop.siop_scorer_noise == trainer.config.algorithm.siop_scorer_noise
    supports = trainer.siop.measures_support
    assert caplog.text.count("the policy as scorer: noise") == supports
    assert f"noise {measured:.1e}" in caplog.text or not supports
    # A text alone for each word of "Q a", all of them, the step.
    assert (calls, trainer.actor_rollout_wg.calls) == ((4, 5) if supports else (0, 0))
    tokens = "siop/tokens/computed"
    assert first.cost[tokens] == again.cost[tokens]  # what is measured is no work of the step


def test_drop_group_writes_zero_rewards_and_a_zero_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(monkeypatch, ("Q b",), siop_on_scorer_error="drop_group")
    trainer._records = {f"{r.uid}_{i % 2}_0": {} for i, r in enumerate(ROLLOUTS)}
    keys = list(trainer._records)
    monkeypatch.setattr(trainer, "_rollouts", lambda keys, data: ROLLOUTS)
    written: dict[str, dict[str, torch.Tensor]] = {key: {} for key in keys}

    def put(keys: list[str], partition_id: str, fields: TensorDict) -> None:
        for name, values in fields.items():
            for key, row in zip(keys, values.unbind(), strict=True):
                written[key][str(name)] = row

    monkeypatch.setattr(module.tq, "kv_batch_put", put)
    masks = [torch.tensor(r.response_mask) for r in ROLLOUTS]
    data = TensorDict({"response_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged)}, batch_size=6)
    # Of the questions that are left the first is right, and the labels of the other cannot be read.
    labels = [{"ground_truth": text} for text in ("x", "x", "y", "y", None, None)]
    labels[4:] = [{"rubric": "x"}] * 2  # type: ignore[list-item]
    data["reward_model"] = NonTensorStack(*labels)
    metrics: dict[str, float] = {}
    trainer._write_turn_rewards(keys, data, "train", metrics)
    for key, mask in zip(keys, masks, strict=True):
        if key.startswith("b"):
            assert set(written[key]) == {"rm_scores", "response_mask", "loss_mask"}
            assert not any(values.any() for values in written[key].values())
        else:
            assert set(written[key]) == {"rm_scores"}
            rewards = written[key]["rm_scores"]
            assert rewards[mask == 1].any()
            assert rewards[rewards != 0].tolist() == trainer._records[key]["turn_rewards"]
    assert metrics["siop/dropped_groups"] == 1 and metrics["siop/groups"] == 2
    assert metrics["siop/heaviest_cluster_right"] in (0, 1)


@pytest.mark.parametrize("estimator", ["siop", "grpo"])
@pytest.mark.parametrize("action", ["stop", "warn"])
def test_every_step_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, estimator: str, action: str
) -> None:
    def step(number: int, answer: str | None, advantage: float, records: list[dict[str, Any]]) -> dict[str, float]:
        rollouts = [search_rollout("a", answer, ["x is here"]) for _ in range(8)]
        fields: dict[str, Any] = {
            "uid": ["a"] * 8,
            "prompts": _jagged([torch.tensor(item.prompt_ids) for item in rollouts]),
            "responses": _jagged([torch.tensor(item.response_ids) for item in rollouts]),
            "response_mask": _jagged([torch.tensor(item.response_mask) for item in rollouts]),
            "raw_prompt": [[{"role": "user", "content": "Q a"}]] * 8,
            "extra_info": [{}] * 8,
            "reward_model": [{"ground_truth": "x"}] * 8,
            "extra_fields": [{"siop_tools": record} for record in records] + [{}] * (8 - len(records)),
            "advantages": _jagged([torch.tensor([0.0, advantage])] * 8),
        }
        monkeypatch.setattr(module.tq, "kv_batch_get", lambda keys, partition_id, select_fields: fields)
        metrics: dict[str, float] = {}
        keys = [f"a_{k}_0" for k in range(8)]
        trainer.global_steps = number
        trainer._compute_advantage(KVBatchMeta(partition_id="train", keys=keys, tags=[{} for _ in keys]), metrics)
        return metrics

    trainer = _trainer(monkeypatch, (), siop_on_nothing_learnt=action)
    trainer.uses_siop, trainer.timing_raw = estimator == "siop", {}
    rollout = {"temperature": 1.0, "n": 8, "multi_turn": {"format": "hermes"}}
    data = {"max_response_length": 9}
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": data, "trainer": {}})
    monkeypatch.setattr(module.tq, "kv_batch_put", lambda **kwargs: None)
    monkeypatch.setattr(module.SupervisedTrainer, "_compute_advantage", lambda self, batch, metrics: batch)
    monkeypatch.setattr(module.SupervisedTrainer, "on_train_begin", lambda self: None)
    step(1, None, 0.0, [])  # an evaluation, or not yet training
    assert not caplog.records
    trainer.on_train_begin()
    ran, unread = ToolRecord(executed=1, offered=["search"]), ToolRecord(unparsed=1, offered=["search"])
    # Not every rollout was counted, so nothing is said about calls.
    metrics = step(1, "x", 0.0, [unread.as_dict()] * 7)
    assert metrics["siop/tool_calls/unparsed"] == 1 and "every advantage is 0" in caplog.text
    assert "tool calls" not in caplog.text
    assert "no answer" not in caplog.text and "<answer> x </answer>" in caplog.text and "x is here" not in caplog.text
    step(2, "x", 0.5, [ran.as_dict()] * 8)
    step(3, "x", 0.0, [ran.as_dict()] * 8)
    step(4, "x", 0.0, [ran.as_dict()] * 8)
    assert len(caplog.records) == 1
    step(5, None, 0.0, [ran.as_dict()] * 8)
    if action == "warn":
        step(6, None, 0.0, [ran.as_dict()] * 8)
        assert len(caplog.records) == 2
    else:
        with pytest.raises(NothingLearnt, match="no answer in 8 of 8 rollouts"):
            step(6, None, 0.0, [ran.as_dict()] * 8)


def test_labels_reach_the_method_only_when_asked_for() -> None:
    one = torch.nested.as_nested_tensor([torch.tensor([1, 2])], layout=torch.jagged)
    fields: dict[str, Any] = {"prompts": one, "responses": one, "response_mask": one * 0 + 1}
    columns = {
        "uid": ["u"],
        "raw_prompt": [[{"role": "user", "content": "who?"}]],
        "extra_info": [{}],
        "reward_model": [{"ground_truth": {"target": ["me"]}}],
        "extra_fields": [{}],
    }

    def rollouts(config: SiopConfig, key: str) -> list[Rollout]:
        trainer = object.__new__(SiopTrainer)
        trainer.siop = config
        return trainer._rollouts([key], {**fields, **columns})  # type: ignore[arg-type]

    assert rollouts(SiopConfig(), "u_0_0") == [Rollout("u", "who?", [1, 2], [1, 2], [1, 1], None)]
    assert rollouts(SiopConfig(siop_use_gold_ref=True), "u_0_0")[0].gold == ["me"]
    columns["extra_fields"] = [{"siop_tools": {"executed_calls": [[("search", "{}")]]}}]
    assert rollouts(SiopConfig(), "u_0_0")[0].executed_calls == [[("search", "{}")]]


def test_several_trajectories_of_a_session_are_refused_by_name() -> None:
    trainer = object.__new__(SiopTrainer)
    with pytest.raises(SiopError, match=r"several trajectories for one session .*u_0_1.*one trajectory per session"):
        trainer._rollouts(["u_0_0", "u_0_1"], {"extra_fields": [{}, {}]})  # type: ignore[arg-type]


def test_question_is_the_bare_one() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Use <think>. Question: who?"},
    ]
    assert question_of(messages, {"question": "who?"}) == "who?"
    assert question_of(messages, {}) == question_of(messages, None) == "Use <think>. Question: who?"
    with pytest.raises(SiopError, match="no user message"):
        question_of(messages[:1], None)


def test_sessions_of_a_question_are_ordered_by_number() -> None:
    keys = ["u-1_10_0", "u-1_2_0", "a_b_0_0"]
    assert sorted(keys, key=session_of) == ["a_b_0_0", "u-1_2_0", "u-1_10_0"]
