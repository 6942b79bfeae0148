"""BM25 over a JSONL corpus: built once, saved next to the corpus, memory-mapped when loaded.

The corpus has one JSON object per line, ``{"id": ..., "contents": ...}``; other keys are kept and returned. It stays
where it is: the index holds the byte offset of each line, and passages are read from the file when they are returned,
so a corpus larger than memory can be served.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from tqdm import tqdm
from verl.utils.siop.errors import SiopError

logger = logging.getLogger(__name__)
# bm25s sets its logger to DEBUG when imported.
logging.getLogger("bm25s").setLevel(logging.WARNING)

Document = dict[str, Any]
Hits = list[tuple[Document, float]]

# Lucene's parameters.
K1, B = 1.2, 0.75
_META, _OFFSETS, _FORMAT = "siop_index.json", "offsets.npy", 1
_WORD = re.compile(r"\w+")
_STOP_WORDS = frozenset(STOPWORDS_EN)


class CorpusError(SiopError, ValueError):
    """The corpus or its index cannot be used; the message names the file, and the line where there is one."""


class Index(Protocol):
    """What the retriever service needs of an index; BM25 here, a dense index elsewhere."""

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` documents of each query with their scores, best first; fewer if fewer match."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...


def tokenize(text: str) -> list[str]:
    """Lower-case runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


class Bm25Index:
    """BM25 with Lucene's formula (k1 = 1.2, b = 0.75) through ``bm25s``.

    English stop words are indexed (they count for a passage's length) but ignored in queries, unless the query has
    nothing else. Equal scores are returned in the order of the corpus.
    """

    def __init__(self, scores: bm25s.BM25, documents: Sequence[Document]) -> None:
        self._scores, self._documents = scores, documents

    def __len__(self) -> int:
        return len(self._documents)

    @classmethod
    def from_documents(cls, documents: Sequence[Document], *, show_progress: bool = False) -> Bm25Index:
        """Index in memory; ``contents`` of each document is searched.

        Raises:
            CorpusError: there is no document.
        """
        if not documents:
            raise CorpusError("the corpus is empty: an index needs at least one document")
        return cls(_index((d["contents"] for d in documents), len(documents), show_progress), documents)

    @classmethod
    def build(
        cls, corpus_path: str | os.PathLike[str], index_dir: str | os.PathLike[str], *, show_progress: bool = True
    ) -> Bm25Index:
        """Reads the corpus, writes the index to ``index_dir`` (replacing an older one) and loads it.

        Raises:
            CorpusError: no such corpus, an empty one, a malformed line (its number is given), or ``index_dir`` holds
                something that is not an index of ours.
        """
        corpus, target = Path(corpus_path), Path(index_dir)
        if target.exists() and not target.is_dir():
            raise CorpusError(f"{target} is a file; the index needs a directory")
        if target.is_dir() and any(target.iterdir()) and not (target / _META).is_file():
            raise CorpusError(f"{target} is not empty and holds no retriever index; choose another index directory")
        # Taken before reading: a corpus that changes meanwhile then looks stale at the next load.
        fingerprint = _fingerprint(corpus)
        offsets: list[int] = []
        contents = (document["contents"] for document in _read_corpus(corpus, offsets, show_progress))
        scores = _index(contents, None, show_progress)
        if not offsets:
            raise CorpusError(f"{corpus} is empty: an index needs at least one document")
        # Written aside and renamed, so that an interrupted build never leaves half an index.
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            scores.save(str(scratch), show_progress=show_progress)
            np.save(scratch / _OFFSETS, np.asarray(offsets, dtype=np.int64))
            meta = {"format": _FORMAT, "corpus": str(corpus.resolve()), "documents": len(offsets), **fingerprint}
            (scratch / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        logger.info("indexed %d documents of %s in %s", len(offsets), corpus, target)
        return cls.load(target)

    @classmethod
    def load(cls, index_dir: str | os.PathLike[str]) -> Bm25Index:
        """Memory-maps a saved index.

        Raises:
            CorpusError: no index there, or its corpus is gone or has changed since it was built.
        """
        directory = Path(index_dir)
        meta = _read_meta(directory)
        if meta is None:
            raise CorpusError(f"{directory} holds no retriever index of this version")
        corpus = Path(meta["corpus"])
        if any(meta.get(key) != value for key, value in _fingerprint(corpus).items()):
            raise CorpusError(f"{corpus} has changed since the index in {directory} was built; build it again")
        scores = bm25s.BM25.load(str(directory), mmap=True, load_corpus=False, show_progress=False)
        return cls(scores, _CorpusFile(corpus, np.load(directory / _OFFSETS, mmap_mode="r")))

    @classmethod
    def open(
        cls, corpus_path: str | os.PathLike[str], index_dir: str | os.PathLike[str], *, show_progress: bool = True
    ) -> Bm25Index:
        """Loads the index if it was built from this corpus as it is now, and builds it otherwise.

        Raises:
            CorpusError: as ``build``.
        """
        corpus, directory = Path(corpus_path), Path(index_dir)
        fingerprint = _fingerprint(corpus) | {"corpus": str(corpus.resolve())}
        meta = _read_meta(directory)
        if meta is not None and all(meta.get(key) == value for key, value in fingerprint.items()):
            logger.info("using the index in %s", directory)
            return cls.load(directory)
        logger.info(
            "indexing %s into %s%s", corpus, directory, "" if meta is None else " again: the corpus has changed"
        )
        return cls.build(corpus, directory, show_progress=show_progress)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` documents of each query, best first; only documents that share a word with the query.

        Raises:
            ValueError: ``k`` is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return [self._search_one(query, k) for query in queries]

    def _search_one(self, query: str, k: int) -> Hits:
        words = tokenize(query)
        ids = self._scores.get_tokens_ids([w for w in words if w not in _STOP_WORDS] or words)
        if not ids:
            return []
        scores = self._scores.get_scores_from_ids(ids)
        found = np.flatnonzero(scores > 0)
        if len(found) > k:
            # Everything at least as good as the k-th, so that a tie at the cut is decided by corpus order.
            cut = np.partition(scores[found], -k)[-k]
            found = found[scores[found] >= cut]
        best = found[np.argsort(-scores[found], kind="stable")][:k]
        return [(self._documents[int(i)], float(scores[i])) for i in best]


class _CorpusFile(Sequence[Document]):
    """The documents of a corpus file, read by byte offset through a memory map."""

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


def _index(contents: Iterable[str], total: int | None, show_progress: bool) -> bm25s.BM25:
    """BM25 scores of all (word, document) pairs; leaves an empty object for an empty corpus."""
    vocabulary: dict[str, int] = {}
    rows = []
    for text in tqdm(contents, desc="tokenize", unit=" documents", total=total, disable=not show_progress):
        rows.append(np.asarray([vocabulary.setdefault(w, len(vocabulary)) for w in tokenize(text)], dtype=np.int32))
    scores = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy")
    if rows:
        vocabulary.setdefault("", len(vocabulary))  # bm25s needs a word even when no document has one
        scores.index((rows, vocabulary), create_empty_token=False, show_progress=show_progress)
    return scores


def _read_corpus(path: Path, offsets: list[int], show_progress: bool) -> Iterator[Document]:
    """Documents of the file; appends each one's byte offset to ``offsets``. Blank lines are skipped."""
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(desc=f"read {path.name}", total=size, unit="B", unit_scale=True, disable=not show_progress) as bar,
    ):
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_line(path, number, line)
                offsets.append(offset)
            offset += len(line)
            bar.update(len(line))


def _parse_line(path: Path, number: int, line: bytes) -> Document:
    where = f"{path}, line {number}"
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


def _fingerprint(corpus: Path) -> dict[str, int]:
    try:
        stat = corpus.stat()
    except OSError as error:
        raise CorpusError(f"cannot read the corpus {corpus}: {error.strerror}") from error
    if not corpus.is_file():
        raise CorpusError(f"the corpus {corpus} is not a file")
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_meta(directory: Path) -> dict[str, Any] | None:
    """Metadata of a saved index, or None if there is none that this version can read."""
    try:
        meta = json.loads((directory / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == _FORMAT else None
