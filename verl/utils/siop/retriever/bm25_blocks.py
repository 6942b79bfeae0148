"""The first half of building: the corpus in blocks, each of which lists the documents of every word in it.

A block is as much as fits a bounded memory. It is a folder, written aside and renamed, with the digest of the corpus up
to its end: an interrupted build goes on after the last block that is whole and of the corpus as it is.
"""

from __future__ import annotations

import logging
import shutil
from array import array
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from verl.utils.siop.retriever.bm25_files import Array, read_slice, write_array
from verl.utils.siop.retriever.bm25_words import TOKENIZER, UNICODE, key_of, tokenize
from verl.utils.siop.retriever.corpus import CorpusError, CorpusReader, Document, check_ids, id_key
from verl.utils.siop.retriever.folder import CorpusIdentity, FileIdentity, identify_files, write_whole

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 2**24  # a build then takes about 1 GB
MAX_DOCUMENTS = 2**31 - 1  # numbers of documents are int32
_BLOCK = "block.json"
_VERSION = f"1, {TOKENIZER}, Unicode {UNICODE}"


class Block(BaseModel):
    """What a block holds; its end is a place in the corpus.

    Attributes:
        version: of the format and of what a word is.
        documents: number of documents of this block and all before it.
        offset, lines: bytes and lines of the corpus up to the end of this block.
        sha256: of those bytes.
        files: by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = _VERSION
    documents: int
    offset: int
    lines: int
    sha256: str
    files: dict[str, FileIdentity]


class Inverter:
    """Documents of a block, on their way from words per document to documents per word.

    Args:
        first: number of the first document.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._words: defaultdict[str, int] = defaultdict()
        self._words.default_factory = self._words.__len__
        self._tokens, self._lengths = array("i"), array("i")
        self._offsets, self._ids = array("q"), array("Q")

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        """What the block holds so far; a document counts as one more, so that empty ones do too."""
        return len(self._tokens) + len(self._lengths)

    def add(self, offset: int, document: Document) -> None:
        """Append a document; ``offset`` is its first byte in the corpus."""
        words = tokenize(document["contents"])
        self._tokens.extend(map(self._words.__getitem__, words))
        self._lengths.append(len(words))
        self._offsets.append(offset)
        self._ids.append(id_key(document))

    def arrays(self) -> dict[str, Array]:
        """The block.

        Returns:
            keys: [words] ascending, uint64.
            starts: [words + 1] where the documents of each word begin in ``documents`` and ``counts``.
            documents: [postings] numbers of documents, ascending within a word.
            counts: [postings] how often the word is in it.
            lengths, offsets, ids: [documents] words, first byte, key of the id.
        """
        keys, ranks = np.unique(np.fromiter(map(key_of, self._words), np.uint64, len(self._words)), return_inverse=True)
        lengths = np.frombuffer(self._lengths, np.int32)
        pairs = ranks[np.frombuffer(self._tokens, np.int32)] << 32
        pairs |= np.repeat(np.arange(len(lengths)), lengths)
        pairs.sort()
        starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(pairs)), bool), pairs[1:] != pairs[:-1]]))
        counts = np.diff(starts, append=len(pairs))
        pairs = pairs[starts]
        return {
            "keys": keys,
            "starts": np.searchsorted(pairs, np.arange(len(keys) + 1) << 32),
            "documents": (self._first + (pairs & 0xFFFFFFFF)).astype(np.int32),
            "counts": counts.astype(np.min_scalar_type(counts.max(initial=0))),
            "lengths": lengths,
            "offsets": np.frombuffer(self._offsets, np.int64),
            "ids": np.frombuffer(self._ids, np.uint64),
        }

    def write(self, folder: Path) -> None:
        for name, values in self.arrays().items():
            write_array(folder / f"{name}.npy", values)


def write_blocks(corpus: Path, parts: Path, *, show_progress: bool) -> tuple[list[Path], CorpusIdentity]:
    """The blocks of a corpus in the folder ``parts``; those that are there and still right are kept.

    Returns:
        The folders of the blocks in order, and what the corpus was when it was read.

    Raises:
        CorpusError: a malformed line, an empty corpus, an id that is there twice, or a full disk. The blocks before the
            fault are kept.
    """
    with CorpusReader(corpus, show_progress=show_progress) as reader:
        blocks, documents = _finished(parts, reader)
        inverter = Inverter(documents)
        for offset, document in reader:
            inverter.add(offset, document)
            if inverter.tokens >= BLOCK_TOKENS:
                blocks.append(_write(inverter, parts, len(blocks), reader, documents := documents + len(inverter)))
                inverter = Inverter(documents)
        if len(inverter):
            blocks.append(_write(inverter, parts, len(blocks), reader, documents := documents + len(inverter)))
        identity = CorpusIdentity(
            path=str(corpus.resolve()), bytes=reader.offset, sha256=reader.sha256, documents=documents
        )
    if not documents:
        raise CorpusError(f"{corpus} is empty: an index needs at least one document")
    check_ids(corpus, read_all(blocks, "ids"), read_all(blocks, "offsets"))
    return blocks, identity


def _write(inverter: Inverter, parts: Path, number: int, reader: CorpusReader, documents: int) -> Path:
    if documents > MAX_DOCUMENTS:
        raise CorpusError(f"{reader.path} has more than {MAX_DOCUMENTS:,} documents; split it")
    scratch, target = parts / "block.new", parts / f"block-{number:05d}"
    scratch.mkdir()
    try:
        inverter.write(scratch)
        block = Block(
            documents=documents,
            offset=reader.offset,
            lines=reader.lines,
            sha256=reader.sha256,
            files=identify_files(scratch, scratch.iterdir()),
        )
        write_whole(scratch / _BLOCK, block.model_dump_json().encode())
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _finished(parts: Path, reader: CorpusReader) -> tuple[list[Path], int]:
    """The blocks that can be kept, and the number of their documents; the reader then is at their end."""
    kept: list[Path] = []
    documents = 0
    found = sorted(parts.glob("block-*"))
    for folder in found:
        try:
            block = Block.model_validate_json((folder / _BLOCK).read_bytes())
            whole = block.files == identify_files(folder, [folder / name for name in block.files])
        except (OSError, ValidationError, CorpusError):
            break
        in_order = folder.name == f"block-{len(kept):05d}" and block.version == _VERSION
        if not (whole and in_order and reader.skip(block.offset, block.lines, block.sha256)):
            break
        kept.append(folder)
        documents = block.documents
    for folder in [*found[len(kept) :], parts / "block.new"]:
        shutil.rmtree(folder, ignore_errors=True)
    if found:
        logger.info("going on after %d documents of an interrupted build in %s", documents, parts)
    return kept, documents


def read_all(blocks: Iterable[Path], name: str) -> Array:
    """One of the arrays over documents, of all blocks."""
    return np.concatenate([read_slice(block / f"{name}.npy") for block in blocks])
