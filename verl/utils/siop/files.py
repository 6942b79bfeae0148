"""Files as all rooms need them: hashed, written whole, and folders that take the place of others at once."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from verl.utils.siop.errors import SiopError

logger = logging.getLogger(__name__)

_BLOCK = 1 << 22
_BEFORE = "before"  # in a workplace: what was at the target, where two names cannot be exchanged
# renameat2(2)
_CURRENT_FOLDER, _EXCHANGE = -100, 2


class InUse(SiopError, RuntimeError):
    """Another process writes there; the message names the target."""


def blocks(path: Path) -> Iterator[bytes]:
    """The content of a file, a few MB at a time."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file aside and renames it, so that half of it is never found."""
    aside = path.with_name(f"{path.name}.partial")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target``, for one process at a time, to make in it what takes the target's place.

    It is gone at the end. What a killed process has left there is swept by the next one.

    Raises:
        InUse: another process has it.
        OSError: it cannot be made.
    """
    place = target.with_name(f".{target.name}.partial")
    place.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(place, target)
    try:
        if (place / _BEFORE).exists() and not target.exists():  # killed between the two renames of put_in_place
            (place / _BEFORE).rename(target)
        for left in place.iterdir():
            _remove(left)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(handle)


def put_in_place(new: Path, target: Path) -> None:
    """Put a folder from the :func:`workplace` of ``target`` there, whatever there is: at once, where names can be
    exchanged; elsewhere by two renames, of which the next workplace undoes one that stood alone.

    Raises:
        OSError: it cannot be put there; what was there still is.
    """
    if not os.path.lexists(target):
        new.rename(target)
    elif not _exchange(new, target):
        before = new.with_name(_BEFORE)
        target.rename(before)
        try:
            new.rename(target)
        except BaseException:
            before.rename(target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Give each of two files the other's name; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = _CURRENT_FOLDER, os.fsencode(one), _CURRENT_FOLDER, os.fsencode(other)
    return rename is not None and rename(*names, _EXCHANGE) == 0


def _locked(place: Path, target: Path) -> int:
    """A descriptor of the folder, with a lock that ends with the process."""
    while True:
        place.mkdir(exist_ok=True)
        try:
            handle = os.open(place, os.O_RDONLY)
        except FileNotFoundError:  # the one who had it was just done
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InUse(f"{target} is being written by another process, which has {place}; wait for its end") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): nothing keeps a second writer away", place, error.strerror)
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), place.stat()):
                return handle
        os.close(handle)  # of a folder that the one before has taken away


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
