"""The warnings and errors in a growing log of verl, Ray, vLLM and this project, each once."""

from __future__ import annotations

import re
from pathlib import Path

# What Ray puts before a line of a worker.
_WORKER = re.compile(r"(?:\x1b\[\d+m)?(?P<worker>\((?:[\w:.]+ )?(?:pid|ip)=[^)]*\))(?:\x1b\[0m)? ?")
_PYTHON = re.compile(r"\S+:\d+: \w*Warning: (?P<text>.*)")
_TIME = r"[\[(]?(?:\d{4}-)?\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,]?\d*[\])]?"
# "WARNING:<time>:text" (verl), "<time> - WARNING - logger - text", "<time> WARNING file.py:85 -- text" (Ray),
# "WARNING <time> [file.py:85] text" (vLLM)
_LOGGED = re.compile(
    rf"(?:{_TIME}[\s,:-]*)?(?:WARNING|ERROR|CRITICAL)[\s:-]+(?:{_TIME}[\s:]*)?"
    r"(?:\[[\w./]+:\d+\] |[\w./]+:\d+ -- |[\w.]+ - )?(?P<text>.*)"
)
_NUMBER = re.compile(r"\d+")
# Of upstream about itself: nothing that a user of this project could change.
_UPSTREAM = re.compile(
    r"engine is not available: "
    r"|Disabled critic as algorithm\.adv_estimator != gae"
    r"|Function '\S+' is deprecated"
    r"|'set_vital' is deprecated"
    r"|Token authentication is enabled for this Ray cluster"
    r"|SIGTERM handler is not set because current thread is not the main thread"
    r"|target_num_threads \d+ should not exceed"
)


class Once:
    """Says of a message whether it is a new one: not of upstream about itself, and not one with other numbers in it."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def is_new(self, message: str) -> bool:
        key = _NUMBER.sub("#", message.partition("\n")[0])
        if key in self._seen or _UPSTREAM.search(message):
            return False
        self._seen.add(key)
        return True


class LogWarnings:
    """Reads what is appended to ``log`` after ``start`` bytes.

    Indented lines belong to the logged message before them from the same worker, as the lines of one block of text.
    """

    def __init__(self, log: Path, start: int) -> None:
        self._log, self._position = log, start
        self._rest = b""
        # Messages that may go on, by worker.
        self._open: dict[str, list[str]] = {}

    def new(self) -> list[str]:
        """The messages that are complete since the last call: what came after them does not belong to them, or nothing
        came between two calls."""
        with open(self._log, "rb") as file:
            file.seek(self._position)
            read = file.read()
        self._position += len(read)
        *lines, self._rest = (self._rest + read).split(b"\n")
        lengths = {worker: len(message) for worker, message in self._open.items()}
        complete: list[list[str]] = []
        for line in lines:
            # Of a line that a progress bar has written over, what is left to see.
            self._line(line.decode(errors="replace").rstrip("\r").rpartition("\r")[2], complete)
        for worker, message in list(self._open.items()):
            if lengths.get(worker) == len(message):
                complete.append(self._open.pop(worker))
        return ["\n".join(message) for message in complete]

    def rest(self) -> list[str]:
        """As :meth:`new`, at the end of the log."""
        messages = self.new() + ["\n".join(message) for message in self._open.values()]
        self._open = {}
        return messages

    def _line(self, line: str, complete: list[list[str]]) -> None:
        prefix = _WORKER.match(line)
        worker, text = (prefix["worker"], line[prefix.end() :]) if prefix else ("", line)
        if worker in self._open and text.startswith(" "):
            self._open[worker].append(text)
            return
        if worker in self._open:
            complete.append(self._open.pop(worker))
        if found := _PYTHON.match(text):
            complete.append([found["text"]])  # the indented line after it is its source
        elif found := _LOGGED.match(text):
            self._open[worker] = [found["text"]]
