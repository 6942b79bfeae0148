"""One output folder has one trainer: a lock on ``OUTPUT/.lock`` that the kernel releases when the process ends."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl.utils.siop.errors import SiopError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# What a file system without flock answers, depending on which it is.
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class OutputInUse(SiopError, RuntimeError):
    """Another run writes to the output folder; the message names it."""


@contextmanager
def output_lock(folder: Path, log: str | None = None) -> Iterator[None]:
    """Hold ``folder`` (created where missing) for this process; ``log`` is told to whoever finds it held.

    Where the file system has no locks, a warning says so, and nothing is locked.

    Raises:
        OutputInUse: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Opened for appending: what the holder wrote must still be there for the message.
    with open(folder / LOCK_FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(folder, file.read()) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            logger.warning(
                "%s cannot be locked (%s): nothing keeps a second trainer out of this folder", folder, error.strerror
            )
        else:
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "log": log}
            file.truncate(0)
            file.write(json.dumps(owner) + "\n")
            file.flush()
        yield


def check_free(folder: Path) -> str:
    """Look whether another process holds ``folder``, without holding it; a line about it.

    Raises:
        OutputInUse: one does.
    """
    try:
        with open(folder / LOCK_FILE) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder, (folder / LOCK_FILE).read_text()) from None
    except OSError:  # there is no such file, or there are no locks
        pass
    return f"{folder}: no other run writes to it"


def _in_use(folder: Path, owner: str) -> OutputInUse:
    return OutputInUse(
        f"trainer.default_local_dir={folder} is the output folder of another run: {_holder(owner)}; stop that run, or "
        "choose another folder"
    )


def _holder(text: str) -> str:
    try:
        owner = json.loads(text)
        named = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        return named + (f", log {owner['log']}" if owner["log"] else "")
    except (ValueError, KeyError, TypeError):
        # The holder has not written it yet, or something else wrote the file.
        return f"a process that {LOCK_FILE} does not name"
