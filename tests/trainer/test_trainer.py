"""The trainer's own decisions: which rows are scored, what happens when the scorer fails, what the question is."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from method_helpers import FailingScorer, byte_tokenizer, run, search_rollout
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.siop import trainer as module
from verl.trainer.siop.trainer import EveryGroupDropped, SiopTrainer, _question, _session
from verl.utils.siop.errors import ScorerError, ScorerUnavailable, SiopError
from verl.utils.siop.siop_process_reward import Rollout, SiopConfig

ROLLOUTS = [search_rollout(uid, answer, ["x is here"]) for uid in ("a", "b", "c") for answer in ("x", "y")]


def _trainer(monkeypatch: pytest.MonkeyPatch, bad: tuple[str, ...], **keys: Any) -> SiopTrainer:
    trainer = object.__new__(SiopTrainer)
    trainer.siop, trainer.gamma, trainer.tokenizer = SiopConfig(**keys), 1.0, byte_tokenizer()
    monkeypatch.setattr(module, "ScoringClient", FailingScorer)
    monkeypatch.setattr(FailingScorer, "bad", bad)
    return trainer


def test_all_rows_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards, rows, dropped, cost = asyncio.run(_trainer(monkeypatch, ())._score(ROLLOUTS))
    assert rows == list(range(6)) and dropped == set()
    assert rewards.turn_rewards == run(ROLLOUTS).turn_rewards
    seconds = {f"siop/seconds/{kind}" for kind in ("cluster", "entailment", "support")}
    assert set(cost) == {*seconds, "siop/tokens/computed", "siop/tokens/requested"}
    assert all(cost[name] > 0 for name in cost)


def test_the_scorer_gets_the_same_requests_whatever_the_uids_and_the_order_of_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    class RecordingScorer(FailingScorer):
        async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
            calls.append(list(pairs))
            return await super().entailment(pairs)

        async def support(self, rollouts: Any) -> list[list[list[float]]]:
            calls.append([(item.prompt_ids, item.response_ids) for item in rollouts])
            return await super().support(rollouts)

    trainer = _trainer(monkeypatch, ())
    monkeypatch.setattr(module, "ScoringClient", RecordingScorer)
    expected, *_ = asyncio.run(trainer._score(ROLLOUTS))
    first, calls = calls, []
    other = [replace(item, uid={"a": "z", "b": "y", "c": "x"}[item.uid]) for item in ROLLOUTS]
    rewards, rows, _, _ = asyncio.run(trainer._score(other[4:] + other[:4]))
    assert calls == first and len(first) == 2
    assert rows == [2, 3, 4, 5, 0, 1] and rewards.turn_rewards == expected.turn_rewards


@pytest.mark.parametrize("strict", [True, False])
def test_the_entailment_rule_reaches_the_scorer(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    given: list[dict[str, Any]] = []

    class NotedScorer(FailingScorer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            given.append(kwargs)

    trainer = _trainer(monkeypatch, (), siop_strict_entailment=strict)
    monkeypatch.setattr(module, "ScoringClient", NotedScorer)
    asyncio.run(trainer._score(ROLLOUTS))
    assert [options["strict"] for options in given] == [strict]


def test_seconds_of_calls_at_the_same_time_count_once() -> None:
    class SlowScorer(FailingScorer):
        async def cluster(self, question: str, answers: list[str]) -> list[int]:
            await asyncio.sleep(0.05)
            return await super().cluster(question, answers)

    async def many() -> float:
        scorer = module.TimedScorer(SlowScorer())  # type: ignore[arg-type]
        start = time.perf_counter()
        await asyncio.gather(*(scorer.cluster("Q", ["x"]) for _ in range(20)))
        await scorer.cluster("Q", ["x"])
        assert 0.1 <= scorer.seconds["cluster"] <= time.perf_counter() - start
        return scorer.seconds["entailment"]

    assert asyncio.run(many()) == 0


def test_a_scorer_error_ends_the_run_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScorerError, match="cannot score Q b"):
        asyncio.run(_trainer(monkeypatch, ("Q b",))._score(ROLLOUTS))


def test_drop_group_leaves_out_the_failed_question_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(monkeypatch, ("Q b",), siop_on_scorer_error="drop_group")
    rewards, rows, dropped, _ = asyncio.run(trainer._score(ROLLOUTS))
    assert dropped == {"b"} and rows == [0, 1, 4, 5]
    assert rewards.turn_rewards == run([ROLLOUTS[row] for row in rows]).turn_rewards


def test_nothing_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(monkeypatch, ("Q a", "Q b", "Q c"), siop_on_scorer_error="drop_group")
    with pytest.raises(EveryGroupDropped, match="all 3 questions"):
        asyncio.run(trainer._score(ROLLOUTS))


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
    rewards, rows, dropped, cost = asyncio.run(trainer._score(ROLLOUTS))
    assert dropped == {"c"} and rows == [0, 1, 2, 3]
    assert rewards.support == [[pytest.approx(math.exp(-1))] * 3] * 4
    assert cost["siop/seconds/support"] > 0
    assert cost["siop/tokens/requested"] > cost["siop/tokens/computed"] > 0
    trainer.siop = SiopConfig(siop_scorer="policy")
    with pytest.raises(ScorerError, match="the actor gave no finite log-prob"):
        asyncio.run(trainer._score(ROLLOUTS))


def test_an_absent_scorer_ends_the_run() -> None:
    trainer = object.__new__(SiopTrainer)
    trainer.tokenizer = byte_tokenizer()
    trainer.siop = SiopConfig(siop_scorer_url="http://127.0.0.1:9", siop_scorer_timeout_s=0.2)
    with pytest.raises(ScorerUnavailable, match=r"127\.0\.0\.1:9"):
        asyncio.run(trainer._score(ROLLOUTS))


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


def test_labels_reach_the_method_only_when_asked_for() -> None:
    one = torch.nested.as_nested_tensor([torch.tensor([1, 2])], layout=torch.jagged)
    fields: dict[str, Any] = {"prompts": one, "responses": one, "response_mask": one * 0 + 1}
    columns = {
        "uid": ["u"],
        "raw_prompt": [[{"role": "user", "content": "who?"}]],
        "extra_info": [{}],
        "reward_model": [{"ground_truth": {"target": ["me"]}}],
    }

    def rollouts(config: SiopConfig, key: str) -> list[Rollout]:
        trainer = object.__new__(SiopTrainer)
        trainer.siop = config
        return trainer._rollouts([key], {**fields, **columns})  # type: ignore[arg-type]

    assert rollouts(SiopConfig(), "u_0_0") == [Rollout("u", "who?", [1, 2], [1, 2], [1, 1], None)]
    assert rollouts(SiopConfig(siop_use_gold_ref=True), "u_0_0")[0].gold == ["me"]


def test_several_trajectories_of_a_session_are_refused_by_name() -> None:
    trainer = object.__new__(SiopTrainer)
    with pytest.raises(SiopError, match=r"several trajectories for one session .*u_0_1.*one trajectory per session"):
        trainer._rollouts(["u_0_0", "u_0_1"], {})  # type: ignore[arg-type]


def test_question_is_the_bare_one() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Use <think>. Question: who?"},
    ]
    assert _question(messages, {"question": "who?"}) == "who?"
    assert _question(messages, {}) == _question(messages, None) == "Use <think>. Question: who?"
    with pytest.raises(SiopError, match="no user message"):
        _question(messages[:1], None)


def test_sessions_of_a_question_are_ordered_by_number() -> None:
    keys = ["u-1_10_0", "u-1_2_0", "a_b_0_0"]
    assert sorted(keys, key=_session) == ["a_b_0_0", "u-1_2_0", "u-1_10_0"]
