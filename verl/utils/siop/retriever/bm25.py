"""BM25 over a corpus: built once, saved next to the corpus, memory-mapped when loaded."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from verl.utils.siop.retriever.bm25_blocks import Inverter, write_blocks
from verl.utils.siop.retriever.bm25_estimate import announce
from verl.utils.siop.retriever.bm25_files import map_array
from verl.utils.siop.retriever.bm25_merge import K1, B, merge
from verl.utils.siop.retriever.bm25_postings import Postings
from verl.utils.siop.retriever.bm25_words import TOKENIZER, UNICODE, query_words, tokenize
from verl.utils.siop.retriever.corpus import CorpusError, CorpusFile, Document, check_corpus, unchanged
from verl.utils.siop.retriever.folder import (
    CorpusIdentity,
    IndexFolderError,
    Manifest,
    check_folder,
    check_target,
    identify_files,
    new_folder,
    read_manifest,
    write_manifest,
)
from verl.utils.siop.retriever.index import Hits, Index
from verl.utils.siop.retriever.parts import forget_blocks, locked_parts

__all__ = ["Bm25Index", "Hits", "Index", "tokenize"]

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

KIND = "bm25"
_SETTINGS = {"k1": K1, "b": B, "words": TOKENIZER}
_PROBES, _PROBE_WORDS = 20, 50  # of the self-test: passages, and the words of each that are searched


class Bm25Index:
    """BM25 with Lucene's formula (k1 = 1.2, b = 0.75; :mod:`bm25_merge`) and exact results.

    English stop words are indexed (they count for a passage's length) but ignored in queries, unless the query has
    nothing else. Equal scores are returned in the order of the corpus.
    """

    def __init__(self, postings: Postings, documents: Sequence[Document]) -> None:
        self._postings, self._documents = postings, documents

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
        inverter = Inverter(0)
        for document in documents:
            inverter.add(0, document)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            block = folder / "block"
            block.mkdir()
            inverter.write(block)
            merge([block], folder, show_progress=show_progress)
            return cls(Postings(folder, len(documents), in_memory=True), documents)

    @classmethod
    def build(
        cls, corpus_path: PathLike, index_dir: PathLike, *, go_on: bool = True, show_progress: bool = True
    ) -> Bm25Index:
        """Reads the corpus, writes the index to ``index_dir`` (replacing an older one) and loads it.

        Memory is bounded however large the corpus is, at about 1.6 GB, apart from 20 bytes a passage. A build that was
        interrupted has left its finished blocks in ``index_dir`` + ".parts", and goes on from there if ``go_on``.

        Raises:
            CorpusError: no such corpus, an empty or a compressed one, a malformed line (its number is given), an id
                that is there twice, a full disk, a corpus that changes meanwhile, or ``index_dir`` holds anything but
                an index of BM25.
        """
        check_corpus(Path(corpus_path))
        with locked_parts(Path(index_dir)) as (parts, _):
            if not go_on:
                forget_blocks(parts)
            return cls._build(Path(corpus_path), Path(index_dir), parts, show_progress)

    @classmethod
    def load(
        cls, index_dir: PathLike, corpus_path: PathLike | None = None, *, show_progress: bool = False
    ) -> Bm25Index:
        """Memory-maps a saved index, after every byte of it and of the corpus was compared with its digests.

        Args:
            index_dir: the folder.
            corpus_path: where the corpus is, if it has moved since the index was built.
            show_progress: of the comparison, which reads both.

        Raises:
            CorpusError: no index there, a damaged one, or its corpus is gone or has changed since it was built.
        """
        directory = Path(index_dir)
        manifest = read_manifest(directory)
        _check_kind(directory, manifest)
        if manifest.settings != _SETTINGS:
            raise IndexFolderError(f"the index in {directory} is of another version; build it again")
        if (unicode := manifest.libraries.get("unicode")) != UNICODE:
            logger.warning(
                "the index in %s was built with Unicode %s, this Python has %s: words of characters that are new in "
                "one of them are not found", directory, unicode, UNICODE,
            )  # fmt: skip
        corpus = Path(corpus_path or manifest.corpus.path)
        with unchanged(corpus, "checked"):
            check_folder(directory, manifest, corpus, show_progress=show_progress)
            index = cls._mapped(directory, corpus, manifest.corpus.documents)
        for number in manifest.self_test:
            if not (0 <= number < len(index) and index._finds(number)):
                raise IndexFolderError(
                    f"self-test: the index in {directory} does not find passage {number} of {corpus} by its own text; "
                    "build it again"
                )
        return index

    @classmethod
    def open(cls, corpus_path: PathLike, index_dir: PathLike, *, show_progress: bool = True) -> Bm25Index:
        """Loads the index if it was built from this corpus as it is now, and builds it otherwise.

        Raises:
            CorpusError: as ``build``.
        """
        corpus, directory = Path(corpus_path), Path(index_dir)
        check_corpus(corpus)
        try:
            return cls._up_to_date(corpus, directory, show_progress)
        except IndexFolderError as error:
            reason = f" again: {error}" if directory.is_dir() else ""
        with locked_parts(directory) as (parts, waited):
            if waited:  # the other process may have built what is needed
                try:
                    return cls._up_to_date(corpus, directory, show_progress)
                except IndexFolderError as error:
                    reason = f" again: {error}"
            logger.info("indexing %s into %s%s", corpus, directory, reason)
            return cls._build(corpus, directory, parts, show_progress)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` documents of each query, best first; only documents that share a word with the query.

        Raises:
            ValueError: ``k`` is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found = [self._postings.top(query_words(query), k) for query in queries]
        return [[(self._documents[number], score) for number, score in hits] for hits in found]

    @classmethod
    def _up_to_date(cls, corpus: Path, directory: Path, show_progress: bool) -> Bm25Index:
        index = cls.load(directory, corpus, show_progress=show_progress)
        logger.info("the index in %s is up to date", directory)
        return index

    @classmethod
    def _build(cls, corpus: Path, target: Path, parts: Path, show_progress: bool) -> Bm25Index:
        check_target(target, KIND)
        announce(corpus, target)
        started = time.monotonic()
        with unchanged(corpus, "indexed") as check:
            blocks, identity = write_blocks(corpus, parts, show_progress=show_progress)
            with new_folder(target, parts, KIND) as scratch:
                merge(blocks, scratch, show_progress=show_progress)
                # Before the self-test, which maps the index: the page cache's memory, not the build's.
                peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                # It stays valid when the folder is renamed, and reads the file that was checked.
                index = cls._mapped(scratch, corpus, identity.documents)
                _write_manifest(scratch, identity, index._probes(), time.monotonic() - started, peak_mb)
                check()
        for block in blocks:
            shutil.rmtree(block)
        logger.info("indexed %d documents of %s in %s", len(index), corpus, target)
        return index

    @classmethod
    def _mapped(cls, folder: Path, corpus: Path, documents: int) -> Bm25Index:
        return cls(Postings(folder, documents), CorpusFile(corpus, map_array(folder / "offsets.npy")))

    def _finds(self, number: int) -> bool:
        """Whether a passage, or one of the same text, is the best hit of its own beginning."""
        text = self._documents[number]["contents"]
        best = self._postings.top(tokenize(text)[:_PROBE_WORDS], 1)
        return bool(best) and self._documents[best[0][0]]["contents"] == text

    def _probes(self) -> list[int]:
        """Passages spread over the corpus that are found by their own text.

        Raises:
            CorpusError: most are not, so that the index is wrong.
        """
        spread = np.unique(np.linspace(0, len(self) - 1, 2 * _PROBES).astype(int)).tolist()
        found = [number for number in spread if self._finds(number)]
        # Few passages may well hide behind each other.
        if len(spread) >= 2 * _PROBES and len(found) < len(spread) / 2:
            raise CorpusError(
                f"self-test: of {len(spread)} passages only {len(found)} are found by their own text; the index would "
                "be wrong and is not kept; please report this with the corpus"
            )
        return found if len(found) <= _PROBES else [found[i * len(found) // _PROBES] for i in range(_PROBES)]


def _check_kind(folder: Path, manifest: Manifest) -> None:
    # Not an IndexFolderError, which has the index built again.
    if manifest.kind != KIND:
        raise CorpusError(f"{folder} holds an index of kind {manifest.kind}, not {KIND}; choose another folder")


def _write_manifest(folder: Path, corpus: CorpusIdentity, self_test: list[int], seconds: float, peak_mb: int) -> None:
    manifest = Manifest(
        kind=KIND,
        corpus=corpus,
        libraries={"numpy": np.__version__, "unicode": UNICODE},
        settings=_SETTINGS,
        self_test=self_test,
        # Of the last run, where it was interrupted; the memory of the whole process.
        measured={"seconds": round(seconds, 1), "peak_mb": peak_mb},
        files=identify_files(folder, folder.glob("*.npy")),
    )
    write_manifest(folder, manifest)
