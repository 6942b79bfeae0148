"""What becomes of a step when some of its rollouts failed. TransferQueue itself is in the end-to-end test."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.siop.replay_buffer import CheckedReplayBuffer, RolloutFailed


@pytest.fixture
def cleared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    keys: list[str] = []
    monkeypatch.setattr(tq, "kv_clear", lambda keys, partition_id, _all=keys: _all.extend(keys))
    return keys


def _sample(monkeypatch: pytest.MonkeyPatch, failed: set[str], partition: str = "train") -> tuple[KVBatchMeta, dict]:
    """Four questions of two rollouts; those in ``failed`` lost one."""
    keys = [f"q{i}_{k}_0" for i in range(4) for k in range(1 if f"q{i}" in failed else 2)]

    def upstream(self: ReplayBuffer, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict]:
        self.failure_keys[partition_id] = set(failed)
        return KVBatchMeta(partition_id=partition_id, keys=keys, tags=[{"n": i} for i in range(len(keys))]), {}

    monkeypatch.setattr(ReplayBuffer, "sample", upstream)
    buffer = CheckedReplayBuffer(
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs={"poll_interval": 0.1},
        refill_fn=None,
    )
    assert buffer.poll_interval == 0.1
    return buffer.sample(global_steps=1, partition_id=partition, batch_size=4)


def test_nothing_failed(monkeypatch: pytest.MonkeyPatch, cleared: list[str]) -> None:
    batch, metrics = _sample(monkeypatch, set())
    assert len(batch.keys) == 8 and metrics == {"siop/failed_groups": 0.0} and cleared == []


def test_a_question_with_a_failed_rollout_is_dropped_whole_and_counted(
    monkeypatch: pytest.MonkeyPatch, cleared: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        batch, metrics = _sample(monkeypatch, {"q1", "q3"})
    assert batch.keys == ["q0_0_0", "q0_1_0", "q2_0_0", "q2_1_0"]
    assert [tag["n"] for tag in batch.tags] == [0, 1, 3, 4]
    assert cleared == ["q1_0_0", "q3_0_0"]
    assert metrics == {"siop/failed_groups": 2.0}
    assert "2 of 4 questions dropped" in caplog.text


def test_more_than_half_ends_the_run(monkeypatch: pytest.MonkeyPatch, cleared: list[str]) -> None:
    with pytest.raises(RolloutFailed, match="rollouts of 3 of 4 train questions failed"):
        _sample(monkeypatch, {"q0", "q1", "q2"})


def test_one_is_enough_in_validation(monkeypatch: pytest.MonkeyPatch, cleared: list[str]) -> None:
    with pytest.raises(RolloutFailed, match="rollouts of 1 of 4 val questions failed"):
        _sample(monkeypatch, {"q2"}, partition="val")
