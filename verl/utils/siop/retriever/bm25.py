"""BM25 over a corpus: built once, saved next to the corpus, memory-mapped when loaded."""

from __future__ import annotations

import json
import logging
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
from verl.utils.siop.retriever.corpus import CorpusError, CorpusFile, Document, fingerprint, read_corpus

logger = logging.getLogger(__name__)
# bm25s sets its logger to DEBUG when imported.
logging.getLogger("bm25s").setLevel(logging.WARNING)

Hits = list[tuple[Document, float]]
PathLike = str | os.PathLike[str]

# Lucene's parameters.
K1, B = 1.2, 0.75
_META, _OFFSETS, _FORMAT = "siop_index.json", "offsets.npy", 1
_WORD = re.compile(r"\w+")
_STOP_WORDS = frozenset(STOPWORDS_EN)


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
        return cls(_index((d["contents"] for d in documents), "the corpus", show_progress), documents)

    @classmethod
    def build(cls, corpus_path: PathLike, index_dir: PathLike, *, show_progress: bool = True) -> Bm25Index:
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
        meta = {"format": _FORMAT, **fingerprint(corpus)}
        offsets: list[int] = []

        def contents() -> Iterator[str]:
            for offset, document in read_corpus(corpus, show_progress=show_progress):
                offsets.append(offset)
                yield document["contents"]

        scores = _index(contents(), str(corpus), show_progress)
        # Written aside and renamed, so that an interrupted build never leaves half an index.
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            scores.save(str(scratch), show_progress=show_progress)
            np.save(scratch / _OFFSETS, np.asarray(offsets, dtype=np.int64))
            meta["documents"] = len(offsets)
            (scratch / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        logger.info("indexed %d documents of %s in %s", len(offsets), corpus, target)
        return cls.load(target)

    @classmethod
    def load(cls, index_dir: PathLike) -> Bm25Index:
        """Memory-maps a saved index.

        Raises:
            CorpusError: no index there, or its corpus is gone or has changed since it was built.
        """
        directory = Path(index_dir)
        meta = _read_meta(directory)
        if meta is None:
            raise CorpusError(f"{directory} holds no retriever index of this version")
        corpus = Path(meta["corpus"])
        if not _is_of(meta, corpus):
            raise CorpusError(f"{corpus} has changed since the index in {directory} was built; build it again")
        scores = bm25s.BM25.load(str(directory), mmap=True, load_corpus=False, show_progress=False)
        return cls(scores, CorpusFile(corpus, np.load(directory / _OFFSETS, mmap_mode="r")))

    @classmethod
    def open(cls, corpus_path: PathLike, index_dir: PathLike, *, show_progress: bool = True) -> Bm25Index:
        """Loads the index if it was built from this corpus as it is now, and builds it otherwise.

        Raises:
            CorpusError: as ``build``.
        """
        corpus, directory = Path(corpus_path), Path(index_dir)
        meta = _read_meta(directory)
        if _is_of(meta or {}, corpus):
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


def _index(contents: Iterable[str], corpus: str, show_progress: bool) -> bm25s.BM25:
    """BM25 scores of all (word, document) pairs."""
    vocabulary: dict[str, int] = {}
    rows = []
    for text in tqdm(contents, desc="tokenize", unit=" documents", disable=not show_progress):
        rows.append(np.asarray([vocabulary.setdefault(w, len(vocabulary)) for w in tokenize(text)], dtype=np.int32))
    if not rows:
        raise CorpusError(f"{corpus} is empty: an index needs at least one document")
    vocabulary.setdefault("", len(vocabulary))  # bm25s needs a word even when no document has one
    scores = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy")
    scores.index((rows, vocabulary), create_empty_token=False, show_progress=show_progress)
    return scores


def _read_meta(directory: Path) -> dict[str, Any] | None:
    """Metadata of a saved index, or None if there is none that this version can read."""
    try:
        meta = json.loads((directory / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == _FORMAT else None


def _is_of(meta: dict[str, Any], corpus: Path) -> bool:
    return fingerprint(corpus).items() <= meta.items()
