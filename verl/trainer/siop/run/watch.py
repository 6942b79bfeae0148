"""Follows the trainer from the process that the user started."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import ray
from verl.trainer.siop.run.channel import Channel
from verl.trainer.siop.run.console import Console
from verl.trainer.siop.run.progress import Progress, is_step, step_numbers, validation_numbers
from verl.trainer.siop.run.stopping import StopSignals

logger = logging.getLogger(__name__)

_PERIOD_S = 0.2
_PATIENCE_S = 10.0


class Watch(threading.Thread):
    """From its start to :meth:`finish`: shows the records of the trainer, and hands the wish to stop on to it.

    A thread of its own, for it waits for Ray's control service, for a minute if that has died.

    Attributes:
        lost: what the run cannot go on without and has lost, in words; None as long as it has all.
    """

    lost: str | None = None

    def __init__(self, console: Console, progress: Progress, signals: StopSignals) -> None:
        super().__init__(name="watch", daemon=True)
        self._console, self._progress, self._signals = console, progress, signals
        self._channel = Channel()
        self._asked = False
        self._finished = threading.Event()

    def run(self) -> None:
        try:
            while not self._finished.wait(_PERIOD_S):
                self._look()
            self._look()
        except (ray.exceptions.RayError, RuntimeError, OSError) as error:
            # Ray's control service is gone, or the log is: the run itself says why, if it ends by that.
            if self._signals.signum is None:
                self._console.line(f"warning: no more news of the training here: {error}")
            logger.exception("the watch over the trainer ended")

    def finish(self) -> None:
        """Show what there still is, and end. If Ray's control service does not answer, there is nothing to show."""
        self._finished.set()
        self.join(_PATIENCE_S)

    def _look(self) -> None:
        for record in self._channel.take():
            self._progress.update(record)
            self._show(record)
        self._console.follow_log()
        if self._signals.deadline is not None and not self._asked:
            self._asked = True
            self._channel.ask_to_stop()
            self._console.tell(
                f"stopping: what is being done is finished and saved, for {self._signals.grace:g} s at most; a second "
                "signal ends the run at once"
            )

    def _show(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "train":
            self._console.line(self._progress.started())
        elif record["kind"] == "questions":
            self._console.questions(self._progress)
        elif record["kind"] == "lost":
            self.lost = record["what"]
        elif record["kind"] == "metrics":
            values = record["values"]
            if is_step(values):
                self._console.step(self._progress, step_numbers(values))
            if (validation := validation_numbers(values)) and not self._progress.evaluates:
                self._console.line(f"validation after step {record['step']}  {validation}")
