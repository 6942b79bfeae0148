"""The second half of building: the blocks become one index, a range of words at a time.

The impact of a word on a document is Lucene's BM25 (Kamphuis et al., ECIR 2020, variant "Lucene (accurate)"), k1 = 1.2
and b = 0.75, with N documents, df of which have the word, tf times in this one:

    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length))

It is computed in 64 bits and kept in 32. The score of a document is the sum over the words of the query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from verl.utils.siop.retriever.bm25_blocks import read_all
from verl.utils.siop.retriever.bm25_files import Array, ArrayFile, read_slice, write_array

K1, B = 1.2, 0.75
ARRAYS = ("keys", "starts", "documents", "impacts", "bounds", "offsets")
_AT_ONCE = 2**22  # postings


def merge(blocks: Sequence[Path], folder: Path, *, show_progress: bool) -> None:
    """Write the arrays of an index.

    keys, starts and documents are as in a block (:meth:`Inverter.arrays`), with impacts [postings] beside documents and
    bounds [words], the largest impact of each. offsets [documents] is where they begin in the corpus.

    Raises:
        CorpusError: the disk is full.
    """
    write_array(folder / "offsets.npy", read_all(blocks, "offsets"))
    lengths = read_all(blocks, "lengths")
    mean = max(lengths.mean(), 1.0)  # 0 if no document has a word
    norms = K1 * (1 - B + B / mean * lengths)
    del lengths
    keys = np.empty(0, np.uint64)
    for block in blocks:
        keys = np.sort(np.concatenate([keys, read_slice(block / "keys.npy")]))
        keys = np.concatenate([keys[:1], keys[1:][keys[1:] != keys[:-1]]])
    frequencies = np.zeros(len(keys), np.int64)
    for block in blocks:
        frequencies[np.searchsorted(keys, read_slice(block / "keys.npy"))] += np.diff(read_slice(block / "starts.npy"))
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(frequencies)])
    idf = np.log1p((len(norms) - frequencies + 0.5) / (frequencies + 0.5))
    bounds = np.zeros(len(keys), np.float32)
    total = int(starts[-1])
    with (
        ArrayFile(folder / "documents.npy", np.int32, total) as documents_file,
        ArrayFile(folder / "impacts.npy", np.float32, total) as impacts_file,
        tqdm(desc="merge", total=total, unit=" postings", unit_scale=True, disable=not show_progress) as bar,
    ):
        for words, documents, counts in _postings(blocks, keys, starts):
            impacts = (idf[words] * counts / (counts + norms[documents])).astype(np.float32)
            np.maximum.at(bounds, words, impacts)
            documents_file.append(documents)
            impacts_file.append(impacts)
            bar.update(len(documents))
    for name, values in (("keys", keys), ("starts", starts), ("bounds", bounds)):
        write_array(folder / f"{name}.npy", values)


def _postings(blocks: Sequence[Path], keys: Array, starts: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Word, document and count of all postings, by word and then by document, in pieces."""
    low = 0
    while low < len(keys):
        high = max(low + 1, int(np.searchsorted(starts, starts[low] + _AT_ONCE, "right")) - 1)
        pieces = (_of_block(block, keys[low:high]) for block in blocks)
        if high == low + 1:  # one word, perhaps of all documents: block after block is its order
            for _, documents, counts in pieces:
                yield np.full(len(documents), low), documents, counts
        else:
            ends = starts[low:high] - starts[low]  # of what is there of each word
            documents = np.empty(starts[high] - starts[low], np.int32)
            counts = np.empty(len(documents), np.int32)
            for lengths, some_documents, some_counts in pieces:
                gaps = ends - (np.cumsum(lengths) - lengths)
                to = np.repeat(gaps, lengths) + np.arange(len(some_documents))
                documents[to], counts[to] = some_documents, some_counts
                ends = ends + lengths
            yield np.repeat(np.arange(low, high), np.diff(starts[low : high + 1])), documents, counts
        low = high


def _of_block(block: Path, keys: Array) -> tuple[Array, Array, Array]:
    """Number of the documents of each of these words in a block, the documents, and the counts."""
    held = np.load(block / "keys.npy", mmap_mode="r")
    low, high = np.searchsorted(held, keys[0]), np.searchsorted(held, keys[-1], "right")
    starts = read_slice(block / "starts.npy", low, high + 1)
    lengths = np.zeros(len(keys), np.int64)
    lengths[np.searchsorted(keys, held[low:high])] = np.diff(starts)
    documents, counts = (read_slice(block / f"{name}.npy", starts[0], starts[-1]) for name in ("documents", "counts"))
    return lengths, documents, counts
