"""A corpus: a file with one JSON object per line, ``{"id": ..., "contents": ...}``; other keys are kept and returned.

It stays where it is: passages are read by the byte offset of their line when they are returned, so a corpus larger than
memory can be served. Blank lines are skipped.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from verl.utils.siop.errors import SiopError
from verl.utils.siop.retriever.bm25_words import key_of

Document = dict[str, Any]
_CHUNK = 2**22
MAX_DEPTH = 32  # lists and objects within each other: answers are written by a library that goes down by calls

# First bytes of a file -> what it is, and the command that unpacks it.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ\x00": ("xz", "unxz -k"),
    b"PK\x03\x04": ("zip", "unzip"),
}


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

    def line(self, i: int) -> int:
        """Number of the line of a document, by counting."""
        end = int(self._offsets[i])
        return 1 + sum(self._bytes[at : min(at + _CHUNK, end)].count(b"\n") for at in range(0, end, _CHUNK))


def check_corpus(path: Path) -> None:
    """Looks at the first bytes.

    Raises:
        CorpusError: it cannot be read or is compressed.
    """
    if path.exists() and not path.is_file():
        raise CorpusError(f"the corpus {path} is not a file")
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CorpusError(f"cannot read the corpus {path}: {error.strerror}") from error
    for magic, (name, unpack) in _COMPRESSED.items():
        if start.startswith(magic):
            raise CorpusError(f"the corpus {path} is compressed ({name}); unpack it first: {unpack} {path}")


Stamp = tuple[int, ...] | None


def stamp_of(corpus: Path) -> Stamp:
    """What changes if the file is written to or replaced: device, number, size and time; None where it is missing."""
    try:
        stat = corpus.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@contextmanager
def unchanged(corpus: Path, what: str) -> Iterator[Callable[[], None]]:
    """A block that reads the corpus more than once, which must be the same file with the same content all the time.

    Args:
        corpus: the file.
        what: happens to it in the block, as "indexed".

    Yields:
        The check, which is also made at the end, and when the block fails: what it read may be why.

    Raises:
        CorpusError: it is not.
    """
    before = stamp_of(corpus)

    def check() -> None:
        if stamp_of(corpus) != before:
            raise CorpusError(f"{corpus} has changed while it was {what}; begin again")

    try:
        yield check
    except Exception:
        check()
        raise
    check()


def check_ids(path: Path, keys: np.ndarray, offsets: np.ndarray) -> None:
    """Ids are compared by keys, 8 bytes a document, and read again where two keys are equal.

    Args:
        path: the corpus.
        keys, offsets: [documents] key of the id (:func:`id_key`), and first byte.

    Raises:
        CorpusError: an id is there twice; both lines are named.
    """
    ordered = np.sort(keys)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return
    documents = CorpusFile(path, offsets)
    numbers = np.flatnonzero(np.isin(keys, twice))
    for one, other in pairwise(numbers[np.argsort(keys[numbers], kind="stable")]):
        name = documents[one]["id"]
        if keys[one] == keys[other] and repr(name) == repr(documents[other]["id"]):
            lines = " and ".join(str(documents.line(i)) for i in (one, other))
            raise CorpusError(f"{path}, lines {lines}: the id {name!r} is there twice; ids must differ")


def id_key(document: Document) -> int:
    """64 bits that stand for the id; a number and the text of it are two ids."""
    return key_of(repr(document.get("id")))


class CorpusReader:
    """One pass over a corpus, which knows where it is and the digest of all bytes before: use it with ``with``.

    Iterating gives the first byte of each document, and the document.

    Attributes:
        offset, lines: bytes and lines that were read.

    Raises:
        CorpusError: no such corpus, a compressed one, or a malformed line; its number is given.
    """

    def __init__(self, path: Path, *, show_progress: bool) -> None:
        check_corpus(path)
        self.path, self.offset, self.lines = path, 0, 0
        self._digest, self._file = hashlib.sha256(), path.open("rb")
        size = path.stat().st_size
        self._bar = tqdm(desc=f"read {path.name}", total=size, unit="B", unit_scale=True, disable=not show_progress)

    @property
    def sha256(self) -> str:
        """Digest of the bytes that were read."""
        return self._digest.hexdigest()

    def __enter__(self) -> CorpusReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._file.close()

    def __iter__(self) -> Iterator[tuple[int, Document]]:
        self._file.seek(self.offset)
        for line in self._file:
            start = self.offset
            self._digest.update(line)
            self.offset += len(line)
            self.lines += 1
            self._bar.update(len(line))
            if line.strip():
                yield start, parse_line(line, f"{self.path}, line {self.lines}")

    def skip(self, offset: int, lines: int, sha256: str) -> bool:
        """Go on from there, if the digest of all before is that one; else stay."""
        digest, left = self._digest.copy(), offset - self.offset
        self._file.seek(self.offset)
        while left > 0 and (block := self._file.read(min(left, _CHUNK))):
            digest.update(block)
            left -= len(block)
        if left or digest.hexdigest() != sha256:
            return False
        self._bar.update(offset - self.offset)
        self._digest, self.offset, self.lines = digest, offset, lines
        return True


def parse_line(line: bytes, where: str) -> Document:
    """The document of a line.

    Raises:
        CorpusError: it is none, or no answer could hold it; the message begins with ``where``.
    """
    try:
        # Not json.loads of bytes, which lets halves of surrogate pairs pass.
        document = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1})") from error
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
        what = f"got {document.get('id')!r:.100}{_instead(document)}"
        raise CorpusError(f"{where}: 'id' must be a string or an integer, {what}; the number of the line will do")
    if not isinstance(document.get("contents"), str):
        what = f"got {document.get('contents')!r:.100}{_instead(document)}"
        raise CorpusError(
            f"{where}: 'contents' must be a string, {what}; it is the title in quotes, a line break and the text, "
            '"\\"TITLE\\"\\nTEXT", or the text alone'
        )
    if deep := [name for name, value in document.items() if _deeper(value, MAX_DEPTH)]:
        raise CorpusError(
            f"{where}: {deep[0]!r} has more than {MAX_DEPTH} lists and objects within each other, which no answer "
            "could hold"
        )
    return document


def _instead(document: Document) -> str:
    """The keys that are there, for a message about one that is not."""
    return f" (the keys are {', '.join(map(repr, list(document)[:10])) or 'none'})"


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return not levels or any(_deeper(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))
