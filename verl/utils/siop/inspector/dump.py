"""Where a run's dump lies, and how its lines are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError
from verl.utils.siop.inspector.schema import (
    DUMP_VERSION,
    SETTINGS_FILE,
    STEPS_FILE,
    DumpedRollout,
    DumpedSettings,
    DumpedStep,
    DumpError,
    parse_rollout,
)

# Offset and length of a line in its file, in bytes.
Place = tuple[int, int]


class Unfinished(DumpError):
    """The file ends within a line: its writer is not done."""


class Dump:
    """The dump of one run.

    Args:
        folder: of the run, with ``rollouts`` in it, or that folder itself.

    Attributes:
        name: of the run.
        rollouts: the folder with the files.

    Raises:
        DumpError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        inner = folder / "rollouts"
        # A training that has not dumped a step: this is its configuration, which it writes first.
        self._awaited = not inner.is_dir() and (folder / "config.yaml").is_file()
        self.rollouts = inner if inner.is_dir() or self._awaited else folder
        if not self._awaited and not self.rollouts.is_dir():
            raise DumpError(
                f"{folder} is no folder of a run: it {'is a file' if folder.exists() else 'does not exist'}"
            )
        if self.rollouts == folder and not any(_steps(folder)):
            raise DumpError(
                f"{folder} holds no dump: there is neither rollouts/ nor a STEP.jsonl in it, nor the config.yaml of a "
                "training that begins"
            )
        run = folder.resolve()
        self.name = run.parent.name if self.rollouts == folder and run.name == "rollouts" else run.name

    def steps(self) -> dict[int, Path]:
        """The files of the steps that are there, by step; none before a training makes the folder.

        Raises:
            DumpError: the folder is gone.
        """
        try:
            found = dict(sorted(_steps(self.rollouts)))
            self._awaited = False
            return found
        except FileNotFoundError as error:
            if self._awaited:
                return {}
            raise DumpError(f"{self.rollouts} is gone") from error

    def file(self, step: int) -> Path:
        """The file of a step, whether it is there or not."""
        return self.rollouts / f"{step}.jsonl"

    def read(self, step: int) -> list[tuple[Place, DumpedRollout]]:
        """All rollouts of a step, with where they stand.

        Raises:
            Unfinished: it is being written.
            DumpError: a line cannot be read.
            OSError: the file is gone.
        """
        path, found, at = self.file(step), [], 0
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DumpError(f"{path} is no file")
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    raise Unfinished(f"{path}: line {number} is not whole")
                rollout = parse_rollout(line, f"{path}, line {number}")
                if rollout.step != step:
                    raise DumpError(f"{path}, line {number}: step is {rollout.step}")
                found.append(((at, len(line)), rollout))
                at += len(line)
        if not found:
            raise Unfinished(f"{path} is empty")
        return found

    def read_places(self, step: int, places: Sequence[Place]) -> list[DumpedRollout]:
        """The rollouts at these places of a step's file.

        Raises:
            DumpError: a line cannot be read.
            OSError: the file is gone.
        """
        path, found = self.file(step), []
        with path.open("rb") as file:
            for offset, length in places:
                file.seek(offset)
                found.append(parse_rollout(file.read(length), f"{path}, at byte {offset}"))
        return found

    def metrics_size(self) -> int:
        """Bytes of ``steps.jsonl``, 0 where there is none."""
        path = self.rollouts / STEPS_FILE
        return path.stat().st_size if path.is_file() else 0

    def metrics(self, after: int = 0) -> Iterator[tuple[int, DumpedStep | DumpError]]:
        """The whole lines of ``steps.jsonl`` from byte ``after`` on, each with the byte where it ends.

        A line that cannot be read is the error that says so.
        """
        path = self.rollouts / STEPS_FILE
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(after)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                after += len(line)
                found: DumpedStep | DumpError
                try:
                    found = DumpedStep.model_validate_json(line)
                    if not 1 <= found.dump_version <= DUMP_VERSION:
                        found = DumpError(f"{path}, before byte {after}: dump_version is {found.dump_version}")
                except ValidationError as error:
                    found = DumpError(f"{path}, before byte {after}: {error.errors()[0]['msg']}")
                yield after, found

    def settings(self, digest: str) -> DumpedSettings:
        """The settings that rollouts name.

        Raises:
            DumpError: they name none (version 1), or it is not there or not whole.
        """
        if not digest:
            raise DumpError(
                f"{self.rollouts} names no settings: it is of dump version 1. Version {DUMP_VERSION} is written by "
                "trainings with this version"
            )
        if not re.fullmatch(r"[\w-]+", digest):
            raise DumpError(f"{self.rollouts} names settings {digest!r}, which is no name of a file")
        path = self.rollouts / SETTINGS_FILE.format(digest)
        try:
            found = DumpedSettings.model_validate(json.loads(path.read_bytes()))
        except OSError as error:
            raise DumpError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise DumpError(f"{path} holds no settings: {error}") from error
        return found

    def all_settings(self) -> list[DumpedSettings]:
        """All settings that are there; of a run that was resumed under other keys several.

        Raises:
            DumpError: some cannot be read.
        """
        before, after = SETTINGS_FILE.split("{}")
        names = sorted(path.name for path in self.rollouts.glob(SETTINGS_FILE.format("*")))
        return [self.settings(name.removeprefix(before).removesuffix(after)) for name in names]


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir():
        if re.fullmatch(r"(0|[1-9][0-9]{0,17})\.jsonl", path.name):
            yield int(path.stem), path
