"""What the records of the trainer say about a run, and how it is told to people."""

from __future__ import annotations

import re
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm
from verl.trainer.siop.report import rows

# Label, metric and digits of the numbers of a step; a metric that the method does not have is not shown.
_STEP = [
    ("EM", "siop/outcome/em", 3),
    ("F1", "siop/outcome/f1", 3),
    ("turns", "siop/turns/mean", 2),
    ("no answer", "siop/no_answer", 2),
]
LATEST = "latest_checkpointed_iteration.txt"  # where verl writes the number of the last checkpoint
_REWARD = ("reward", "critic/score/mean", 3)


@dataclass(kw_only=True)
class Progress:
    """The state of a run, from records ``{"kind": …}``:

    ``train`` (step: where it starts, total), ``step`` (one begins), ``saved`` (step), ``metrics`` (step, values),
    ``questions`` (of a validation: done, total, seconds).
    """

    folder: Path
    """``trainer.default_local_dir``, where the checkpoints are."""
    resume_mode: str = "auto"
    resume_path: str | None = None
    evaluates: bool = False
    """Whether the run is an evaluation, which trains nothing."""
    total: int = 0
    step: int = 0
    """Steps that are done."""
    training: bool = False
    checkpoint: Path | None = None
    """The last checkpoint of this run: written, or started from."""
    questions: tuple[int, int, float] | None = None
    """Of the last validation: questions that are done, all, seconds."""
    _began: float | None = None
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=10))

    @classmethod
    def of(cls, config: DictConfig) -> Progress:
        """Before the start of a run with ``config``."""
        trainer = config.trainer
        return cls(
            folder=Path(trainer.default_local_dir),
            resume_mode=trainer.resume_mode,
            resume_path=trainer.resume_from_path,
            evaluates=trainer.get("val_only", False),
        )

    def update(self, record: Mapping[str, Any]) -> None:
        """Take in a record."""
        match record["kind"]:
            case "train":
                self.training, self.step, self.total = True, record["step"], record["total"]
                if self.step:
                    named = self.resume_path if self.resume_mode == "resume_path" else None
                    self.checkpoint = Path(named) if named else self._checkpoint_of(self.step)
            case "step":
                self._began = time.monotonic()
            case "questions":
                self.questions = record["done"], record["total"], record["seconds"]
            case "saved":
                self.checkpoint = self._checkpoint_of(record["step"])
            case "metrics" if is_step(record["values"]):
                self.step, self._began = record["step"], None
                self._seconds.append(record["values"]["timing_s/step"])

    def is_complete(self, steps: int | None) -> bool:
        """Whether the checkpoint that the run would go on from is that of its last step; told by :meth:`started` then.

        Args:
            steps: of the training; None if nobody knows.
        """
        named = self.resume_path if self.resume_mode == "resume_path" else None
        if self.resume_mode == "auto":
            latest = self.folder / LATEST
            number = latest.read_text().strip() if latest.is_file() else ""
            named = str(self._checkpoint_of(int(number))) if number.isdecimal() else None
        found = re.search(r"global_step_(\d+)/?$", named or "")
        if steps is None or found is None or int(found[1]) < steps or not Path(str(named)).is_dir():
            return False
        self.update({"kind": "train", "step": int(found[1]), "total": int(found[1])})
        return True

    def _checkpoint_of(self, step: int) -> Path:
        return self.folder / f"global_step_{step}"

    def time_left(self) -> str:
        """Of the steps that are left, at the mean pace of the last ten, as ``[H:]MM:SS``."""
        return tqdm.format_interval(statistics.fmean(self._seconds) * (self.total - self.step))

    def started(self) -> str:
        """The line about the start of the training loop."""
        if self.checkpoint is None:
            return f"training, {self.total} steps"
        left = self.total - self.step
        if not left:
            return (
                f"all {self.total} steps are done, in {self.checkpoint}: more come of a higher trainer.total_epochs, a "
                "new run of trainer.resume_mode=disable"
            )
        return f"training goes on from {self.checkpoint}, {left} step{'s are' if left > 1 else ' is'} left"

    def seconds_until_saved(self) -> float | None:
        """Estimate of when the step in progress ends, from the last one.

        0 if that is not known, None before the training loop, where there is nothing to save.
        """
        if not self.training:
            return None
        if self._began is None or not self._seconds:
            return 0.0
        return max(0.0, self._seconds[-1] - (time.monotonic() - self._began))

    def stopped(self, signal_name: str) -> str:
        """The line that a run which a signal stopped ends with."""
        if self.evaluates:
            done, total = self.questions[:2] if self.questions else (0, "all")
            return f"the evaluation was stopped by {signal_name} after {done} of {total} questions; it has no results"
        if not self.training:
            earlier = "; what was saved in earlier runs is as it was" if any(self.folder.glob("global_step_*")) else ""
            return f"stopped by {signal_name} before the first step{earlier}"
        return f"stopped by {signal_name} at step {self.step}; {self.last_checkpoint()}"

    def last_checkpoint(self) -> str:
        """From where the run can go on, and how."""
        if self.checkpoint is None:
            return "there is no checkpoint: the same command starts from the beginning"
        resumes = self.resume_mode == "auto" or str(self.checkpoint) == self.resume_path
        how = "the same command" if resumes else "trainer.resume_mode=auto"
        return f"the last checkpoint is {self.checkpoint}; {how} goes on from there"


def is_step(values: Mapping[str, float]) -> bool:
    """Whether logged values are those of a training step; a validation may be among them."""
    return "training/global_step" in values


def step_numbers(values: Mapping[str, float]) -> str:
    """EM and F1 (the mean reward where there are no labels), turns, share without an answer, seconds."""
    shown = _STEP if "siop/outcome/em" in values else [_REWARD, *_STEP]
    numbers = [f"{label} {values[name]:.{digits}f}" for label, name, digits in shown if name in values]
    return "  ".join([*numbers, f"{values['timing_s/step']:.1f} s"])


def validation_numbers(values: Mapping[str, float]) -> str:
    """EM and F1, averaged over the data sources, where there are labels; turns. Empty without a validation."""
    if not any(name.startswith("val-") for name in values):
        return ""
    numbers = []
    if averages := rows(dict(values)):
        _, em, f1 = averages[-1]
        numbers += [f"{label} {value:.3f}" for label, value in (("EM", em), ("F1", f1)) if value is not None]
    if (turns := values.get("val-aux/turns/mean")) is not None:
        numbers.append(f"turns {turns:.2f}")
    return "  ".join(numbers) or "no labels"
