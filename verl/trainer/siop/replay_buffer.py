"""verl's replay buffer for synchronous training, with checks that no failed rollout is passed over in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.siop.errors import SiopError
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

logger = logging.getLogger(__name__)


class RolloutFailed(SiopError, RuntimeError):
    """So many rollouts failed that what is left is not a fair sample."""


def column(data: TensorDict, name: str) -> list[Any]:
    """One field of a TransferQueue batch as a list of rows: verl stores nested tensors, arrays and wrapped objects."""
    values = data[name]
    if isinstance(values, torch.Tensor):
        return list(values.unbind())
    return [getattr(value, "data", value) for value in values]


class CheckedReplayBuffer(ReplayBuffer):
    """The sampler named in ``siop_trainer.yaml`` (``trainer.v1.sampler.custom_sampler``).

    Upstream goes on with the sessions that are left when others fail. A failure is seldom independent of what the agent
    did (with the retriever down, only rollouts that never search survive), so here a training question with a failed
    session is dropped whole and counted, and the run stops when more than half of a step's questions, or any
    validation question, are concerned.

    Attributes:
        on_validation: gets every validation batch while its rollouts are there.
        on_progress: gets the number of questions of a validation that have ended, at every look for more.
        dead_worker: says of a process that generates that it has died, None while all live; asked at every look for
            more rollouts.
        on_finished: gets the keys of a training question's rollouts, and the partition, as soon as the last of them
            has ended without an error, while those of others go on.
    """

    on_validation: Callable[[KVBatchMeta], None] | None = None
    on_progress: Callable[[int], None] | None = None
    on_finished: Callable[[list[str], str], None] | None = None
    dead_worker: Callable[[], str | None] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(poll_interval=float(kwargs["sampler_kwargs"].get("poll_interval", 2.0)), **kwargs)
        self._causes: dict[str, str] = {}  # of the first failure in a partition
        self._told: set[str] = set()  # finished questions of the step
        self._sampling = ""  # the partition
        self._validation: dict[str, list[int]] = {"turns": [], "response_tokens": []}
        self._validated = 0  # questions in earlier batches of the validation

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        """Upstream's batch without the questions that lost a rollout.

        Raises:
            RolloutFailed: too many did, with the first cause.
        """
        self._told, self._sampling = set(), partition_id
        try:
            batch, metrics = super().sample(global_steps, partition_id, batch_size)
        except RuntimeError:
            # If nothing at all is left, upstream advises a key that this sampler does not read.
            if self._too_many_failed(partition_id, batch_size):
                raise self._failure(partition_id, batch_size) from None
            raise
        if self._too_many_failed(partition_id, batch_size):
            raise self._failure(partition_id, batch_size)
        failed = self.failure_keys[partition_id]
        if failed:
            logger.error(
                "%d of %d questions dropped because a rollout of each failed%s",
                len(failed),
                batch_size,
                self._first_cause(partition_id),
            )
            batch = self._without(batch, failed)
        if partition_id == "val":
            self._validated += batch_size
            self._note_validation(batch)
        else:
            metrics["siop/failed_groups"] = float(len(failed))
        return batch, metrics

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()
        if self.on_progress is not None:
            self.on_progress(self._validated + len(self.finished_keys["val"]) + len(self.failure_keys["val"]))
        self._causes = {}
        for partition_id, failed in self.failure_keys.items():
            if failed:
                # Upstream keeps of a question's tags its status alone.
                tags = (tq.kv_list(partition_id) or {}).get(partition_id, {})
                found = [
                    (tag["failed_at"], tag["failure"])
                    for uid, tag in tags.items()
                    if uid in failed and "failure" in tag
                ]
                self._causes[partition_id] = min(found)[1] if found else ""
        if self._sampling == "train" and self.on_finished is not None:
            self._tell_finished(self._sampling, self.on_finished)
        if self.dead_worker is not None and (dead := self.dead_worker()):
            raise self._lost(self._sampling, dead)

    def _tell_finished(self, partition_id: str, tell: Callable[[list[str], str], None]) -> None:
        new = self.finished_keys[partition_id] - self._told
        if not new:
            return
        self._told |= new
        keys_of: dict[str, list[str]] = {}
        for key in self.partitions[partition_id]:
            keys_of.setdefault(key.split("_")[0], []).append(key)
        for uid in sorted(new):
            if uid in keys_of:
                tell(keys_of[uid], partition_id)

    def _too_many_failed(self, partition_id: str, batch_size: int) -> bool:
        # Groups that ended since, beyond the batch, are looked at with their own batch.
        return len(self.failure_keys[partition_id]) > (0 if partition_id == "val" else batch_size // 2)

    def _failure(self, partition_id: str, batch_size: int) -> RolloutFailed:
        return RolloutFailed(
            f"rollouts of {len(self.failure_keys[partition_id])} of {batch_size} {partition_id} questions failed"
            + (self._first_cause(partition_id) or "; the reasons are logged above")
        )

    def _lost(self, partition_id: str, dead: str) -> RolloutFailed:
        waiting = sorted(self.pending_keys[partition_id] | self.running_keys[partition_id])
        names = ", ".join(waiting[:3]) + (" …" if len(waiting) > 3 else "")
        return RolloutFailed(
            f"a process that generates rollouts has died, and {len(waiting)} {partition_id} questions wait for it "
            f"({names}): {dead}"
        )

    def _first_cause(self, partition_id: str) -> str:
        cause = self._causes.get(partition_id)
        return f"; the first of them: {cause}" if cause else ""

    def _without(self, batch: KVBatchMeta, uids: set[str]) -> KVBatchMeta:
        kept = [(key, tag) for key, tag in zip(batch.keys, batch.tags, strict=True) if key.split("_")[0] not in uids]
        dropped = sorted(set(batch.keys) - {key for key, _ in kept})
        if dropped:
            tq.kv_clear(keys=dropped, partition_id=batch.partition_id)
        return KVBatchMeta(
            partition_id=batch.partition_id, keys=[key for key, _ in kept], tags=[tag for _, tag in kept]
        )

    def _note_validation(self, batch: KVBatchMeta) -> None:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
        masks = column(data, "response_mask")
        self._validation["turns"] += [len(get_assistant_turn_ranges(mask)) for mask in masks]
        self._validation["response_tokens"] += [int(mask.sum()) for mask in masks]
        if self.on_validation is not None:
            self.on_validation(batch)

    def take_validation_metrics(self) -> dict[str, float]:
        """Means over the validation rollouts since the last call: assistant turns and tokens the model generated."""
        metrics = {f"val-aux/{name}/mean": float(np.mean(x)) for name, x in self._validation.items() if x}
        self._validation, self._validated = {name: [] for name in self._validation}, 0
        return metrics
