"""The folder in which an index of BM25 is built: the blocks that are finished, and the index that is merged of them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl.utils.siop.retriever.corpus import CorpusError

logger = logging.getLogger(__name__)


def parts_of(target: Path) -> Path:
    """Beside the index, so that it moves there by a rename; it stays after an interruption."""
    return target.with_name(f"{target.name}.parts")


def forget_parts(target: Path) -> None:
    """Remove what an interrupted build has finished."""
    shutil.rmtree(parts_of(target), ignore_errors=True)


@contextmanager
def locked_parts(target: Path) -> Iterator[tuple[Path, bool]]:
    """The folder, held against other processes, and whether another one was waited for; removed at the end if empty.

    Raises:
        CorpusError: it cannot be made.
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
            # The other one may have removed the folder that this lock is of.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), parts.stat()):
                    yield parts, waited
                    return
        finally:
            with contextlib.suppress(OSError):
                parts.rmdir()
            os.close(descriptor)
