"""What becomes of a step when some of its rollouts failed. TransferQueue itself is in the end-to-end test."""

from __future__ import annotations

import logging
from collections import defaultdict
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


def _buffer() -> CheckedReplayBuffer:
    return CheckedReplayBuffer(
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs={"poll_interval": 0.1},
        refill_fn=None,
    )


def _sample(
    monkeypatch: pytest.MonkeyPatch, failed: set[str], partition: str = "train", causes: dict[str, Any] | None = None
) -> tuple[KVBatchMeta, dict]:
    """Four questions of two rollouts; those in ``failed`` lost one, with ``causes``. If all failed, nothing is left."""
    keys = [f"q{i}_{k}_0" for i in range(4) for k in range(1 if f"q{i}" in failed else 2)]

    def upstream(self: ReplayBuffer, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict]:
        self._sync_metadata_from_transfer_queue()
        if len(failed) == 4:
            raise RuntimeError("Enable trainer.v1.sampler.sync_refill_failed_groups to replace failed groups.")
        return KVBatchMeta(partition_id=partition_id, keys=keys, tags=[{"n": i} for i in range(len(keys))]), {}

    prompts: dict[str, Any] = {
        f"q{i}": {"is_prompt": True, "global_steps": 1, "status": "failure" if f"q{i}" in failed else "finished"}
        for i in range(4)
    }
    for uid, tag in (causes or {}).items():
        prompts[uid].update(tag)
    stored = {partition: prompts, "other": {"q9": prompts["q0"] | {"status": "finished"}}}
    monkeypatch.setattr(tq, "kv_list", lambda part=None: stored if part is None else {part: stored[part]})
    monkeypatch.setattr(ReplayBuffer, "sample", upstream)
    buffer = _buffer()
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


def test_the_questions_of_a_validation_that_have_ended_are_told_over_all_its_batches(
    monkeypatch: pytest.MonkeyPatch, cleared: list[str]
) -> None:
    statuses = ["pending", "running", "finished", "failure", "finished"]
    tags = {f"q{i}": {"is_prompt": True, "global_steps": 1, "status": status} for i, status in enumerate(statuses)}
    monkeypatch.setattr(tq, "kv_list", lambda part=None: {"val": tags} if part is None else {part: tags})
    buffer = _buffer()
    told: list[int] = []
    buffer.on_progress = told.append
    buffer._sync_metadata_from_transfer_queue()
    # A batch of four that ended well, and the next one.
    batch = KVBatchMeta(partition_id="val", keys=[], tags=[])
    monkeypatch.setattr(ReplayBuffer, "sample", lambda *args, **kwargs: (batch, {}))
    monkeypatch.setattr(tq, "kv_batch_get", lambda **kwargs: {"response_mask": []})
    buffer.failure_keys.clear()
    buffer.sample(global_steps=1, partition_id="val", batch_size=4)
    buffer._sync_metadata_from_transfer_queue()
    buffer.take_validation_metrics()
    buffer._sync_metadata_from_transfer_queue()
    assert told == [3, 7, 3]


def test_more_than_half_ends_the_run(monkeypatch: pytest.MonkeyPatch, cleared: list[str]) -> None:
    with pytest.raises(RolloutFailed, match="rollouts of 3 of 4 train questions failed"):
        _sample(monkeypatch, {"q0", "q1", "q2"})


def test_one_is_enough_in_validation(monkeypatch: pytest.MonkeyPatch, cleared: list[str]) -> None:
    with pytest.raises(RolloutFailed, match="rollouts of 1 of 4 val questions failed"):
        _sample(monkeypatch, {"q2"}, partition="val")


def _cause(text: str, when: float) -> dict[str, Any]:
    return {"failure": text, "failed_at": when}


def test_the_error_has_the_cause_of_the_first_failure(monkeypatch: pytest.MonkeyPatch, cleared: list[str]) -> None:
    causes = {
        "q0": _cause("ValueError: late", 3.0),
        "q2": _cause("ValueError: no label", 1.0),
        "q3": _cause("lost", 0.5),
    }
    failed = {"q0", "q1", "q2"}  # q3's rollout failed too, but the question has ended well, or goes on
    with pytest.raises(RolloutFailed, match=r"3 of 4 train questions failed; the first of them: ValueError: no label$"):
        _sample(monkeypatch, failed, causes=causes)
    with pytest.raises(RolloutFailed, match=r"3 of 4 train questions failed; the reasons are logged above$"):
        _sample(monkeypatch, failed)


def test_with_nothing_left_our_error_speaks_and_not_verls_advice(
    monkeypatch: pytest.MonkeyPatch, cleared: list[str]
) -> None:
    with pytest.raises(
        RolloutFailed, match=r"4 of 4 train questions failed; the first of them: KeyError: 'x'$"
    ) as error:
        _sample(monkeypatch, {"q0", "q1", "q2", "q3"}, causes={"q1": _cause("KeyError: 'x'", 1.0)})
    assert error.value.__suppress_context__


def test_another_error_of_verl_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def upstream(self: ReplayBuffer, **kwargs: Any) -> Any:
        raise RuntimeError("the storage is gone")

    buffer = object.__new__(CheckedReplayBuffer)
    buffer.failure_keys = defaultdict(set)
    monkeypatch.setattr(ReplayBuffer, "sample", lambda self, *args: upstream(self))
    with pytest.raises(RuntimeError, match="the storage is gone") as error:
        buffer.sample(1, "train", 4)
    assert not isinstance(error.value, RolloutFailed)


def test_dropped_questions_are_logged_with_the_first_cause(
    monkeypatch: pytest.MonkeyPatch, cleared: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    _sample(monkeypatch, {"q1"}, causes={"q1": _cause("TimeoutError", 1.0)})
    assert "1 of 4 questions dropped because a rollout of each failed; the first of them: TimeoutError" in caplog.text


@pytest.mark.parametrize("partition", ["train", "val"])
def test_a_question_is_told_once_as_soon_as_its_last_rollout_has_ended(
    monkeypatch: pytest.MonkeyPatch, cleared: list[str], partition: str
) -> None:
    """By verl's own loop, over polls in which one question after another ends; one of them with a failure."""
    polls = [
        {"q0": "running", "q1": "running", "q2": "pending"},
        {"q0": "running", "q1": "finished", "q2": "running"},
        {"q0": "running", "q1": "finished", "q2": "finished"},
        {"q0": "failure" if partition == "train" else "finished", "q1": "finished", "q2": "finished"},
    ]
    told: list[tuple[int, list[str], str]] = []
    seen = -1

    def kv_list(part: str | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        nonlocal seen
        seen += part is None
        items: dict[str, dict[str, Any]] = {}
        for uid, status in polls[seen].items():
            items[uid] = {"is_prompt": True, "status": status, "global_steps": 1}
            items |= {f"{uid}_{session}_0": {"n": session} for session in (1, 0) if status != "pending"}
        return {partition: items}

    monkeypatch.setattr(tq, "kv_list", kv_list)
    buffer = CheckedReplayBuffer(
        trainer_mode="sync",
        trainer_config={},
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs={"poll_interval": 0.001},
        refill_fn=None,
    )
    buffer.on_finished = lambda keys, part: told.append((seen, sorted(keys), part))
    monkeypatch.setattr(buffer, "_note_validation", lambda batch: None)
    batch, _ = buffer.sample(global_steps=1, partition_id=partition, batch_size=3)
    if partition == "val":
        assert told == [] and len(batch.keys) == 6
        return
    assert told == [(1, ["q1_0_0", "q1_1_0"], "train"), (2, ["q2_0_0", "q2_1_0"], "train")]
    assert sorted(batch.keys) == ["q1_0_0", "q1_1_0", "q2_0_0", "q2_1_0"]
    # In the next step the same question would be told again.
    seen = 1
    buffer.sample(global_steps=2, partition_id=partition, batch_size=3)
    assert [entry[1:] for entry in told[2:]] == [entry[1:] for entry in told[:2]]


def test_questions_of_a_worker_that_died_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {f"q{i}": {"is_prompt": True, "global_steps": 1, "status": "running"} for i in range(5)}
    prompts["q0"]["status"] = "finished"
    monkeypatch.setattr(tq, "kv_list", lambda part=None: {"train": prompts} if part is None else {part: prompts})
    buffer, looks = _buffer(), iter([None, None, "AgentLoopWorkerTQ, pid 17: killed"])
    buffer.poll_interval = 0.0
    buffer.dead_worker = lambda: next(looks)
    with pytest.raises(
        RolloutFailed, match=r"4 train questions wait for it \(q1, q2, q3 …\): AgentLoopWorkerTQ, pid 17"
    ):
        buffer.sample(global_steps=1, partition_id="train", batch_size=5)
