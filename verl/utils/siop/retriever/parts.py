"""The folder beside an index in which it is made: held by one process, and swept of what a killed one left."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl.utils.siop.retriever.corpus import CorpusError

logger = logging.getLogger(__name__)

NEW, OLD = "index", "index.old"  # what grows there, and what it has replaced
_OURS = re.compile(rf"block-\d+|block\.new|{NEW}|{re.escape(OLD)}|\..*")  # a hidden file is the system's


def parts_of(target: Path) -> Path:
    """Beside the index, so that it moves there by a rename; it stays after an interruption."""
    target = target.resolve()
    return target.with_name(f"{target.name}.parts")


@contextmanager
def locked_parts(target: Path) -> Iterator[tuple[Path, bool]]:
    """The folder, held against other processes, and whether another one was waited for; removed at the end if empty.

    What a killed process left is removed, and an index that it had moved aside is put back.

    Raises:
        CorpusError: it cannot be made, or holds something that no build has left there.
    """
    parts, waited = parts_of(target), False
    while True:
        try:
            parts.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(parts, os.O_RDONLY)
        except OSError as error:
            raise CorpusError(f"cannot write {parts}: {error.strerror}; choose another index folder") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process builds %s; waiting for it", target)
                waited = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_same(parts, descriptor):
                _sweep(target, parts)
                yield parts, waited
                return
        finally:
            with contextlib.suppress(OSError):
                parts.rmdir()
            os.close(descriptor)


def forget_blocks(parts: Path) -> None:
    """Remove what an interrupted build of BM25 has finished."""
    for block in parts.glob("block[-.]*"):
        shutil.rmtree(block)


def replace(target: Path, parts: Path) -> None:
    """Let what has grown in ``parts`` take the place of ``target``: two renames, between which a kill loses nothing."""
    target = target.resolve()
    if target.exists():
        target.rename(parts / OLD)
    (parts / NEW).rename(target)
    shutil.rmtree(parts / OLD, ignore_errors=True)


def _is_same(parts: Path, descriptor: int) -> bool:
    """Whether the lock is of the folder that is there: the process that was waited for may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), parts.stat())
    except FileNotFoundError:
        return False


def _sweep(target: Path, parts: Path) -> None:
    if foreign := sorted(path.name for path in parts.iterdir() if not _OURS.fullmatch(path.name)):
        raise CorpusError(
            f"{parts} holds {', '.join(foreign[:3])}, which no build left there; choose another index folder"
        )
    target = target.resolve()
    if (parts / OLD).is_dir() and not target.exists():
        (parts / OLD).rename(target)
    for name in (NEW, OLD):
        shutil.rmtree(parts / name, ignore_errors=True)
