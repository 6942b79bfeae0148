"""Vectors from a prebuilt faiss file, as the one that Search-R1 publishes: read in blocks, without faiss."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from verl.utils.siop.retriever.encoder import E5_PROMPTS, Encoder
from verl.utils.siop.retriever.folder import IndexFolderError, Manifest
from verl.utils.siop.retriever.vector_job import VectorJob
from verl.utils.siop.retriever.vectors import best_keys, scores_and_rows

logger = logging.getLogger(__name__)

# faiss's IndexFlatIP: name, dimension, rows, two unused, is trained, metric (0 is inner product), number of floats.
_HEADER = struct.Struct("<4siqqqBiQ")
_FLAT_IP, _INNER_PRODUCT = b"IxFI", 0
CHECKED, MIN_COSINE = 64, 0.99
_SEARCHED = 8  # of those that disagree, to find out why
_BLOCK_ROWS = 65_536
_MAX_LENGTH_ERROR = 0.01


@dataclass(frozen=True)
class FaissFlatFile:
    """A faiss ``IndexFlatIP`` on disk: its header and ``count`` x ``dimension`` float32."""

    path: Path
    count: int
    dimension: int

    @classmethod
    def open(cls, path: Path) -> FaissFlatFile:
        """Reads the header.

        Raises:
            IndexFolderError: it is no such file, or its length is not what its header says.
        """
        try:
            with path.open("rb") as file:
                head = file.read(_HEADER.size)
            size = path.stat().st_size
        except OSError as error:
            raise IndexFolderError(f"cannot read {path}: {error.strerror}") from error
        if head[:4] != _FLAT_IP:
            raise IndexFolderError(
                f"{path} begins with {head[:4]!r}, not with {_FLAT_IP!r}: only faiss's exact index with inner product "
                "(IndexFlatIP) holds the vectors themselves; encode the corpus instead"
            )
        if len(head) < _HEADER.size:
            raise IndexFolderError(
                f"{path} has {size} bytes, and a header alone {_HEADER.size}: it was not downloaded or joined whole"
            )
        _, dimension, count, _, _, _, metric, floats = _HEADER.unpack(head)
        if min(dimension, count) < 1 or metric != _INNER_PRODUCT or floats != count * dimension:
            raise IndexFolderError(
                f"{path} has a header that is not of IndexFlatIP (metric {metric}, {floats} numbers for {count} x "
                f"{dimension})"
            )
        expected = _HEADER.size + 4 * floats
        if size != expected:
            raise IndexFolderError(
                f"{path} has {size} bytes, and its header says {expected}: it was not downloaded or joined whole"
            )
        return cls(path, count, dimension)

    @property
    def source(self) -> str:
        """What identifies the file without reading all of it."""
        stat = self.path.stat()
        return f"faiss {self.path.name}, {stat.st_size} bytes, changed at {stat.st_mtime_ns} ns"

    def read(self, rows: range) -> np.ndarray:
        """[rows, dimension] float32."""
        offset = _HEADER.size + 4 * self.dimension * rows.start
        # Not a memory map: its numbers would not be aligned.
        return np.fromfile(self.path, "<f4", len(rows) * self.dimension, offset=offset).reshape(-1, self.dimension)


def import_vectors(job: VectorJob, file: FaissFlatFile, encoder: Encoder, *, show_progress: bool = True) -> Manifest:
    """Writes the vectors of the file as float16 shards, after a check that they are those of the corpus.

    Raises:
        IndexFolderError: other vectors: the message says whether number, dimension, prefix, order or else differs.
        CorpusError: a shard cannot be written.
    """
    job.announce("this machine")
    check_vectors(job, file, encoder, show_progress=show_progress)
    with job.bar(show_progress) as bar:
        for number in job.todo:
            rows = job.rows(number)
            vectors = file.read(rows)
            _check_lengths(file, rows, vectors)
            job.write(number, vectors)
            bar.update(len(rows))
    return job.finish(encoder, {"imported": {"file": file.source}})


def check_vectors(job: VectorJob, file: FaissFlatFile, encoder: Encoder, *, show_progress: bool = True) -> None:
    """Compares 64 vectors of the file with those that the encoder gives for their passages: cosines from .99.

    Raises:
        IndexFolderError: as :func:`import_vectors`.
    """
    if file.count != len(job.documents):
        raise IndexFolderError(
            f"{file.path} has {file.count} vectors, and {job.corpus} {len(job.documents)} passages: another corpus"
        )
    if file.dimension != encoder.identity.dimension:
        raise IndexFolderError(
            f"{file.path} has vectors of {file.dimension} numbers, and {encoder.identity.model} gives "
            f"{encoder.identity.dimension}: another encoder"
        )
    chosen = np.unique(np.linspace(0, file.count - 1, CHECKED).astype(int)).tolist()
    texts = [job.documents[row]["contents"] for row in chosen]
    theirs = np.concatenate([file.read(range(row, row + 1)) for row in chosen])
    _check_lengths(file, chosen, theirs)
    cosines = _cosines(theirs, encoder.encode_passages(texts))
    wrong = np.flatnonzero(cosines < MIN_COSINE)
    if len(wrong) == 0:
        logger.info("%d passages have the vectors of %s (cosine from %.4f)", len(chosen), file.path, cosines.min())
        return
    prefix = encoder.identity.passage_prompt
    told = f"{file.path}: {len(wrong)} of {len(chosen)} passages have other vectors (cosine from {cosines.min():.3f})"
    for other in sorted({"", *E5_PROMPTS} - {prefix}):
        if np.median(_cosines(theirs, encoder.encode_with(other, texts))) >= MIN_COSINE:
            raise IndexFolderError(
                f"{told}: they were made with the prefix {other!r}, not {prefix!r} (--passage-prefix)"
            )
    some = wrong[:_SEARCHED].tolist()
    vectors = torch.from_numpy(encoder.encode_passages([texts[i] for i in some]))
    scores, rows = scores_and_rows(best_keys(_blocks(file, show_progress), vectors, 1))
    moved = [f"passage {chosen[i]} has row {row}" for i, row in zip(some, rows[:, 0], strict=True)]
    if np.median(scores[:, 0]) >= MIN_COSINE:
        raise IndexFolderError(f"{told}: the corpus is in another order ({'; '.join(moved[:3])})")
    raise IndexFolderError(
        f"{told}, and no row of the file is near theirs (best cosine {scores.max():.3f}): another encoder than "
        f"{encoder.identity.model}, or another corpus than {job.corpus}"
    )


def _check_lengths(file: FaissFlatFile, rows: Sequence[int], vectors: np.ndarray) -> None:
    lengths = np.linalg.norm(vectors, axis=1)
    good = np.abs(lengths - 1) <= _MAX_LENGTH_ERROR  # false for NaN
    if not good.all():
        bad = int(np.argmin(good))
        raise IndexFolderError(f"{file.path}, row {rows[bad]}: the vector has length {lengths[bad]:.4g}, expected 1")


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1)


def _blocks(file: FaissFlatFile, show_progress: bool) -> Iterator[tuple[int, torch.Tensor]]:
    for first in tqdm(range(0, file.count, _BLOCK_ROWS), desc="look for the vectors", disable=not show_progress):
        rows = range(first, min(first + _BLOCK_ROWS, file.count))
        yield first, torch.from_numpy(file.read(rows))
