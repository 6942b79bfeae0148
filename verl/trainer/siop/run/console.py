"""What people see of a run, while everything that it prints goes into the log.

With ``SIOP_CONSOLE=people`` and ``SIOP_LOG=FILE`` in the environment, the file descriptors 1 and 2 of this process lead
into FILE, and with them the output of Ray's workers and of every library; a few lines go to where they led before.
Without ``SIOP_CONSOLE``, everything is printed as it comes, and of these lines only those about the end of the run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm
from verl.trainer.siop.run.counting import Due, told
from verl.trainer.siop.run.log_warnings import LogWarnings, Once
from verl.trainer.siop.run.progress import Progress
from verl.utils.siop.errors import SiopConfigError

_STEPS = "step {n_fmt}/{total_fmt} {bar}{postfix}, {remaining} left"
_QUESTIONS = "{desc} {bar}"
# Of a message that a library warns with; the log has the rest.
_MOST_CHARACTERS = 400
_OUTPUTS = (1, 2)


class Console:
    """See the module.

    Args:
        log: where the output goes; None prints it.
    """

    def __init__(self, log: Path | None) -> None:
        self.log = log
        self._out, self._err = _Screen(sys.stdout), _Screen(sys.stderr)
        self._bar: tqdm | None = None
        self._bar_format = ""
        self._due = Due()
        self._once = Once()
        self._warnings: LogWarnings | None = None
        self._handler: logging.Handler | None = None

    @classmethod
    def from_environment(cls) -> Console:
        """Raises:
        SiopConfigError: ``SIOP_CONSOLE`` is neither unset nor ``people``, or ``SIOP_LOG`` is missing.
        """
        mode, log = os.environ.get("SIOP_CONSOLE", ""), os.environ.get("SIOP_LOG", "")
        if mode not in ("", "people"):
            raise SiopConfigError(f"SIOP_CONSOLE={mode} is not allowed: people, or unset")
        if mode and not log:
            raise SiopConfigError("SIOP_CONSOLE=people needs SIOP_LOG, the file that takes the output of the run")
        return cls(Path(log) if mode else None)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """What is printed inside goes into the log, what comes after does not."""
        before = self._into_log() if self.log is not None else []
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip(_OUTPUTS, before, strict=False):
                os.dup2(copy, descriptor)
                os.close(copy)

    def _into_log(self) -> list[int]:
        """Lead the outputs of this process into the log; copies of where they led."""
        assert self.log is not None
        sys.stdout.flush()
        sys.stderr.flush()
        before = [os.dup(descriptor) for descriptor in _OUTPUTS]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for descriptor in _OUTPUTS:
            os.dup2(file, descriptor)
        os.close(file)
        return before

    def __enter__(self) -> Console:
        if self.log is not None:
            self._out, self._err = (_Screen(os.fdopen(copy, "w")) for copy in self._into_log())
            self._warnings = LogWarnings(self.log, self.log.stat().st_size)
            self._handler = _WarningHandler(self)
            logging.getLogger().addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_bar()
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)

    def line(self, text: str) -> None:
        """Show a line, above the bar where there is one."""
        if self.log is not None:
            self._write(self._out, text)

    def tell(self, text: str) -> None:
        """Show a line wherever the output goes."""
        self._write(self._err, text)

    def _write(self, screen: _Screen, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        screen.write(text + "\n")
        if self._bar is not None:
            self._bar.refresh()

    def step(self, progress: Progress, numbers: str) -> None:
        """Show that a step is done, and its numbers: a bar on a terminal, else a line."""
        if self.log is None or not self._out.isatty():
            self.line(f"step {progress.step}/{progress.total}  {numbers}  {progress.time_left()} left")
            return
        bar = self._bar_of(_STEPS, progress.total, progress.step - 1)
        bar.set_postfix_str(numbers, refresh=False)
        bar.update(progress.step - bar.n)

    def questions(self, progress: Progress) -> None:
        """Show how many questions of a validation are done: a bar on a terminal, else a line now and then."""
        assert progress.questions is not None
        done, total, seconds = progress.questions
        if self.log is None or not self._out.isatty():
            if not done:
                self._due = Due()
            if not done or done == total or self._due(seconds):
                self.line(told(done, total, seconds))
            return
        bar = self._bar_of(_QUESTIONS, total, 0)
        bar.set_description_str(told(done, total, seconds), refresh=False)
        bar.n = done
        bar.refresh()

    def _bar_of(self, bar_format: str, total: int, initial: int) -> tqdm:
        """The bar of this kind and length; one of another kind makes way for it."""
        if self._bar is not None and (self._bar_format, self._bar.total) != (bar_format, total):
            self._bar.leave = False
            self.end_bar()
        if self._bar is None:
            self._bar_format = bar_format
            self._bar = tqdm(
                total=total,
                initial=initial,
                file=self._out,
                bar_format=bar_format,
                dynamic_ncols=True,
                mininterval=0,
            )
        return self._bar

    def follow_log(self, to_its_end: bool = False) -> None:
        """Show the warnings that the log has got since the last call, each once in a run."""
        if self._warnings is not None:
            for message in self._warnings.rest() if to_its_end else self._warnings.new():
                self.warning(message)

    def warning(self, message: str) -> None:
        """Show a warning that was not shown before."""
        if self._once.is_new(message):
            first, *others = message.split("\n")
            shown = first if len(first) <= _MOST_CHARACTERS else first[:_MOST_CHARACTERS] + " …"
            self.line("\n".join([f"warning: {shown}", *others]))

    def error(self, message: str) -> None:
        """Show why the run ended, in full, and where the log is, wherever the output goes."""
        self.follow_log(to_its_end=True)
        self.tell(f"error: {message}" + (f"\nlog: {self.log}" if self.log else ""))

    def end_bar(self) -> None:
        """Leave the bar as it is; what comes next begins on a line of its own."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Screen:
    """Where people look: a terminal, or what they have redirected it to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._closed = False

    def write(self, text: str) -> None:
        if self._closed:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # A closed terminal, or a pipe that nobody reads, is no reason to end a training; the log has it all.
            self._closed = True

    def flush(self) -> None:
        """Nothing is kept back."""

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


class _WarningHandler(logging.Handler):
    """Warnings of this process, whose lines in the log do not say that they are warnings."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warning(record.getMessage())
