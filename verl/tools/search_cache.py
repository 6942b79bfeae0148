"""Results of a paid web search on disk, one file each, shared by processes and machines."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from verl.tools.search_config import shown_url
from verl.utils.siop.errors import SiopConfigError

logger = logging.getLogger(__name__)


def is_hit(hit: Any) -> bool:
    """Whether this is one of the service's organic results: title and snippet are texts, where they are there."""
    return isinstance(hit, dict) and all(isinstance(hit.get(key) or "", str) for key in ("title", "snippet"))


class SearchCache:
    """Hits by address and body of the request; the key of the service is no part of it and is stored nowhere.

    A file is written aside and renamed, so a reader sees a whole entry or none; of two writers the last one stays. An
    entry that cannot be read, or is one of another request, is a miss with a warning, and the next write replaces it.

    Args:
        folder: where it is; made at the first write. ``~`` is the user's home.
        writable: whether entries will be added, or only replayed.

    Raises:
        SiopConfigError: it is no folder, or cannot be written.
    """

    def __init__(self, folder: str | Path, *, writable: bool) -> None:
        try:
            self.path = Path(folder).expanduser().absolute()
            existing = next(p for p in (self.path, *self.path.parents) if p.exists())
            usable = existing.is_dir() and (not writable or os.access(existing, os.W_OK | os.X_OK))
        except (OSError, RuntimeError):  # a name that is too long, no such user
            usable = False
        if not usable:
            raise SiopConfigError(
                f"SERPER_CACHE_DIR={str(folder)!r} must be a folder that can be written; an empty value switches it off"
            )
        self._reported = False

    def is_empty(self) -> bool:
        """Whether there is nothing to replay."""
        return next(self.path.glob("??/*.json"), None) is None

    def read(self, url: str, body: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The stored hits, or None."""
        path = self._file(url, body)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError("not a file")  # a pipe would be waited for
            entry = json.loads(path.read_text(encoding="utf-8"))
            hits = entry["organic"]
            if entry["body"] != body or not isinstance(hits, list) or not all(map(is_hit, hits)):
                raise ValueError("not an answer to this request")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("the cached search %s is unusable (%s: %s)", path, type(error).__name__, error)
            return None
        return hits

    def write(self, url: str, body: dict[str, Any], organic: list[dict[str, Any]]) -> None:
        """Stores hits; if that fails, says so once, since the search itself was good."""
        path = self._file(url, body)
        aside = path.with_name(f"{path.stem}.{uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps({"url": shown_url(url), "body": body, "organic": organic}), encoding="utf-8")
            aside.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            if not self._reported:
                self._reported = True
                logger.error("searches cannot be stored in SERPER_CACHE_DIR=%s: %s", self.path, error)

    def _file(self, url: str, body: dict[str, Any]) -> Path:
        address = str(httpx.URL(url).copy_with(userinfo=b"", fragment=None))
        key = hashlib.sha256(json.dumps([address, body], sort_keys=True).encode()).hexdigest()
        return self.path / key[:2] / f"{key}.json"
