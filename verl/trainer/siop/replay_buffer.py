"""verl's replay buffer for synchronous training, with checks that no failed rollout is scored as if it were a good one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from verl.utils.siop.errors import SiopError
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

# Where a tool notes, in the agent loop's extra fields, that it failed for a reason that is not the model's.
TOOL_ERROR = "tool_error"


def column(data: TensorDict, name: str) -> list[Any]:
    """One field of a TransferQueue batch as a list of rows: verl stores nested tensors, arrays and wrapped objects."""
    values = data[name]
    if isinstance(values, torch.Tensor):
        return list(values.unbind())
    return [getattr(value, "data", value) for value in values]


class RolloutFailed(SiopError, RuntimeError):
    """Rollouts failed, or hold an observation that is the text of a failure."""


class CheckedReplayBuffer(ReplayBuffer):
    """The sampler named in ``siop_trainer.yaml`` (``trainer.v1.sampler.custom_sampler``).

    verl's agent loop hands the text of a tool's exception to the model as its observation, and its sampler goes on
    without the sessions that failed. Training on the former would teach the agent to answer without search, and
    validation without the latter would report a metric over other questions; both stop the run here. In training,
    sessions that failed are left out and counted.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(poll_interval=float(kwargs["sampler_kwargs"].get("poll_interval", 2.0)), **kwargs)
        self._validation: dict[str, list[int]] = {"turns": [], "response_tokens": []}

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        failed = len(self.failure_keys[partition_id])
        if partition_id == "val" and failed:
            raise RolloutFailed(f"{failed} validation question(s) have failed rollouts; see the errors logged above")
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=partition_id, select_fields=["extra_fields", "response_mask"]
        )
        for fields in column(data, "extra_fields"):
            if fields.get(TOOL_ERROR):
                raise RolloutFailed(f"a tool failed during rollouts: {fields[TOOL_ERROR]}")
        if partition_id == "val":
            masks = column(data, "response_mask")
            self._validation["turns"] += [len(get_assistant_turn_ranges(mask)) for mask in masks]
            self._validation["response_tokens"] += [int(mask.sum()) for mask in masks]
        else:
            metrics["siop/failed_groups"] = failed
        return batch, metrics

    def take_validation_metrics(self) -> dict[str, float]:
        """Means over the validation rollouts since the last call: assistant turns and tokens the model generated."""
        metrics = {f"val-aux/{name}/mean": float(np.mean(x)) for name, x in self._validation.items() if x}
        self._validation = {name: [] for name in self._validation}
        return metrics
