"""How far a validation is, as ``12 of 420 questions, about 03:20 left``: in the log, and to the driver."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm
from verl.trainer.siop.run.channel import Channel

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # verl leaves the root at WARNING

_RECORD_S = 1.0
_LINE_S = 10.0
_FEW = 5


class Due:
    """Says when a line about something that goes on is due: every ten seconds, later each twentieth of its time."""

    def __init__(self) -> None:
        self._next = _LINE_S

    def __call__(self, seconds: float) -> bool:
        if seconds < self._next:
            return False
        self._next = max(seconds + _LINE_S, seconds * 1.05)
        return True


def told(done: int, total: int, seconds: float) -> str:
    """The count, and how long the rest takes at the mean pace of the ``seconds`` so far, once that means something."""
    counts = _FEW <= done < total
    left = f", about {tqdm.format_interval(seconds / done * (total - done))} left" if counts else ""
    return f"{done} of {total} questions{left}"


class QuestionCounter:
    """Called with the number of questions that have ended, again and again.

    Args:
        total: questions of the validation.
        channel: to the driver; gets records ``questions`` (done, total, seconds).
    """

    def __init__(self, total: int, channel: Channel) -> None:
        self._total, self._channel = total, channel
        self._began, self._sent, self._shown = time.monotonic(), -_RECORD_S, -1
        self._due = Due()

    def __call__(self, done: int) -> None:
        seconds, ended = time.monotonic() - self._began, done >= self._total
        if done == self._shown or (seconds - self._sent < _RECORD_S and not ended):
            return
        self._sent, self._shown = seconds, done
        self._channel.put("questions", done=done, total=self._total, seconds=seconds)
        if self._due(seconds) or ended:
            logger.info("validation: %s", told(done, self._total, seconds))
