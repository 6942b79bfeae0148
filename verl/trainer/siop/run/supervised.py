"""verl's synchronous PPO trainer, as the driver sees it from another process: it reports, and it can be stopped."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from omegaconf import open_dict
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.trainer.siop.run.channel import Channel
from verl.trainer.siop.run.liveness import QueueWatch
from verl.utils.tracking import Tracking


class _DriverLogger:
    """A backend of verl's ``Tracking`` that sends what is logged to the driver."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def log(self, data: Mapping[str, Any], step: int) -> None:
        values = {name: float(value) for name, value in data.items() if isinstance(value, numbers.Real)}
        self._channel.put("metrics", step=step, values=values)


class SupervisedTrainer(PPOTrainerSync):
    """Sends records (see :class:`~verl.trainer.siop.run.progress.Progress`) and, once asked to stop, saves and ends.

    The end comes after the step in progress, or after the validation in progress, with a checkpoint of that step unless
    ``trainer.save_freq`` is off; the step is logged like any other.
    """

    _tracking: Tracking
    # The step of the last checkpoint; None before the training loop.
    _saved: int | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._channel = Channel()

    def fit(self, agent_loop_manager: Any) -> None:
        watch = QueueWatch(self._channel)
        watch.start()
        try:
            super().fit(agent_loop_manager)
        finally:
            watch.finish()

    @property
    def logger(self) -> Tracking:
        """Where verl's loop logs; the driver is one more backend, whatever ``trainer.logger`` names."""
        return self._tracking

    @logger.setter
    def logger(self, tracking: Tracking) -> None:
        tracking.logger["driver"] = _DriverLogger(self._channel)  # type: ignore[assignment]
        self._tracking = tracking

    def on_train_begin(self) -> None:
        super().on_train_begin()
        self._saved = self.global_steps - 1
        self._channel.put("train", step=self._saved, total=self.total_training_steps)

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self._channel.put("step", step=self.global_steps)

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        self._saved = self.global_steps
        self._channel.put("saved", step=self._saved)

    def on_step_end(self) -> None:
        if self._channel.stop_asked():
            self._stop_after_this_step()
        super().on_step_end()

    def on_validate_end(self) -> None:
        super().on_validate_end()
        if self._saved is not None and self._channel.stop_asked():
            # As before an update: the rollout engine must not hold the memory that saving needs.
            self.checkpoint_manager.sleep_replicas()
            self._stop_after_this_step()

    def _stop_after_this_step(self) -> None:
        if self.config.trainer.save_freq > 0 and self._saved != self.global_steps:
            self._save_checkpoint()
        with open_dict(self.config):
            self.config.trainer.test_freq = -1  # no validation for a run that ends
        self.total_training_steps = self.global_steps
