"""Results of a paid web search on disk, one file each, shared by processes and machines."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from verl.tools.search_config import shown_url
from verl.utils.siop.errors import SiopConfigError

logger = logging.getLogger(__name__)


class SearchCache:
    """Hits by address and body of the request; the key of the service is no part of it and is stored nowhere.

    A file is written aside and renamed, so a reader sees a whole entry or none; of two writers the last one stays. An
    entry that cannot be read, or is one of another request, is a miss with a warning, and the next write replaces it.

    Args:
        path: the folder; made at the first write.
        writable: whether entries will be added, or only replayed.

    Raises:
        SiopConfigError: it is no folder, or cannot be written.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path.absolute()
        existing = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not existing.is_dir() or (writable and not os.access(existing, os.W_OK | os.X_OK)):
            raise SiopConfigError(
                f"SERPER_CACHE_DIR={str(path)!r} must be a folder that can be written; an empty value switches it off"
            )
        self._reported = False

    def is_empty(self) -> bool:
        """Whether there is nothing to replay."""
        return next(self.path.glob("??/*.json"), None) is None

    def read(self, url: str, body: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The stored hits, or None."""
        path = self._file(url, body)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["body"] != body or not all(isinstance(hit, dict) for hit in entry["organic"]):
                raise ValueError("not an answer to this request")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("the cached search %s is unusable (%s: %s)", path, type(error).__name__, error)
            return None
        return list(entry["organic"])

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
