"""Directory of a private Ray, which disappears also when its owner was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path


class RayDir:
    """A new directory ``/tmp/siop-*`` for a private Ray, so that no other Ray on the machine is mixed up with it.

    Its owner holds a lock on the file ``/tmp/siop-*.lock`` beside it. The system frees the lock when the owner dies,
    and the next :class:`RayDir` removes what has no owner. It is under ``/tmp`` itself and has a short name because Ray
    puts sockets there, whose paths may have 107 characters.

    Attributes:
        path: the directory.
    """

    def __init__(self) -> None:
        for lock in Path("/tmp").glob("siop-*.lock"):
            _remove_if_abandoned(lock)
        while True:
            descriptor, name = tempfile.mkstemp(prefix="siop-", suffix=".lock", dir="/tmp")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)  # taken for abandoned before it was locked
        self._descriptor, self._lock = descriptor, Path(name)
        self.path = self._lock.with_suffix("")
        self.path.mkdir(mode=0o700)

    def remove(self) -> None:
        """Remove the directory; call it after Ray has been stopped."""
        for _ in range(20):  # Ray's last processes may still write there
            if _remove(self._lock):
                break
            time.sleep(0.1)
        os.close(self._descriptor)


def _remove(lock: Path) -> bool:
    path = lock.with_suffix("")
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        return False
    lock.unlink(missing_ok=True)
    return True


def _remove_if_abandoned(lock: Path) -> None:
    # OSError: its owner lives, or it is another user's, or it is gone by now.
    with contextlib.suppress(OSError):
        descriptor = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock)
        finally:
            os.close(descriptor)
