"""A corpus: a file with one JSON object per line, ``{"id": ..., "contents": ...}``; other keys are kept and returned.

It stays where it is: passages are read by the byte offset of their line when they are returned, so a corpus larger than
memory can be served. Blank lines are skipped.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from verl.utils.siop.errors import SiopError

Document = dict[str, Any]


class CorpusError(SiopError, ValueError):
    """The corpus or its index cannot be used; the message names the file, and the line where there is one."""


class CorpusFile(Sequence[Document]):
    """The documents of a corpus, read through a memory map.

    Args:
        path: the file.
        offsets: [documents] first byte of each.
    """

    def __init__(self, path: Path, offsets: np.ndarray) -> None:
        self._offsets = offsets
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: Any) -> Any:
        start = int(self._offsets[i])
        end = self._bytes.find(b"\n", start)
        return json.loads(self._bytes[start : end if end >= 0 else len(self._bytes)])


def read_corpus(path: Path, *, show_progress: bool) -> Iterator[tuple[int, Document]]:
    """First byte of each document, and the document.

    Raises:
        CorpusError: a malformed line; its number is given.
    """
    offset = 0
    with (
        path.open("rb") as file,
        tqdm(
            desc=f"read {path.name}", total=path.stat().st_size, unit="B", unit_scale=True, disable=not show_progress
        ) as bar,
    ):
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield offset, _parse_line(line, f"{path}, line {number}")
            offset += len(line)
            bar.update(len(line))


def fingerprint(path: Path) -> dict[str, Any]:
    """What is the same as long as the corpus is.

    Raises:
        CorpusError: it cannot be read.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise CorpusError(f"cannot read the corpus {path}: {error.strerror}") from error
    if not path.is_file():
        raise CorpusError(f"the corpus {path} is not a file")
    return {"corpus": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _parse_line(line: bytes, where: str) -> Document:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not valid JSON ({error})") from error
    if b"\\u" in line:
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"{where}: half a surrogate pair, which no answer could hold ({error.reason})") from error
    if not isinstance(document, dict):
        raise CorpusError(f"{where}: expected an object with 'id' and 'contents', got {type(document).__name__}")
    if not isinstance(document.get("id"), str | int):
        raise CorpusError(f"{where}: 'id' must be a string or an integer, got {document.get('id')!r}")
    if not isinstance(document.get("contents"), str):
        raise CorpusError(f"{where}: 'contents' must be a string, got {document.get('contents')!r}")
    return document
