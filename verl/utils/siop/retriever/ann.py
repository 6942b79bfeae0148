"""Approximate search by faiss, from a memory-mapped file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from verl.utils.siop.retriever.encoder import EncoderError
from verl.utils.siop.retriever.folder import IndexFolderError

INDEX_FILE = "index.faiss"
KINDS = ("hnsw", "hnsw_sq8", "ivf_sq8")
HNSW_NEIGHBOURS, HNSW_EF_CONSTRUCTION = 32, 100
# At least MAX_TOPK, so that the best of k and of fewer come from the same search.
HNSW_EFFORTS = (128, 256, 512, 1024)
TRAINING_ROWS = 65_536
_ROWS_PER_LIST = 64


def load_faiss() -> Any:
    """The library.

    Raises:
        EncoderError: it is not installed.
    """
    logging.getLogger("faiss").setLevel(logging.WARNING)  # its loader tells which instruction sets it tries
    try:
        import faiss
    except ImportError as error:
        raise EncoderError(
            f"this kind of index needs the extra 'retrieval' (pip install 'siop-verl[retrieval]'): {error}"
        ) from error
    return faiss


def file_bytes(kind: str, documents: int, dimension: int) -> int:
    """Size of an index, about; it is built in memory of that size."""
    graph = 4 * (2 * HNSW_NEIGHBOURS + 2) + 12
    per_row = {"hnsw": 4 * dimension + graph, "hnsw_sq8": dimension + graph, "ivf_sq8": dimension + 8}[kind]
    return documents * per_row


class AnnVectors:
    """A faiss index.

    Args:
        index: with inner product.
        kind: hnsw, hnsw_sq8 or ivf_sq8.
        effort: candidates of a search in a graph (efSearch), or lists that are searched (nprobe).
    """

    def __init__(self, index: Any, kind: str, effort: int) -> None:
        self._faiss, self._index, self._kind = load_faiss(), index, kind
        self.effort = effort

    @property
    def count(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """Numbers of a vector."""
        return int(self._index.d)

    @property
    def efforts(self) -> list[int]:
        """From little to much."""
        if self._kind != "ivf_sq8":
            return list(HNSW_EFFORTS)
        lists = int(self._index.nlist)
        return sorted({min(lists, 8 * 2**i) for i in range(20)})

    @classmethod
    def load(cls, path: Path, kind: str, effort: int, written_by: str) -> AnnVectors:
        """Memory-maps a file.

        Args:
            path: the file.
            kind: of the index in it.
            effort: see the class.
            written_by: version of faiss that wrote it, for the message.

        Raises:
            IndexFolderError: faiss cannot read it.
        """
        faiss = load_faiss()
        # IO_FLAG_MMAP alone would read all but inverted lists into memory, without a word.
        flag = faiss.IO_FLAG_MMAP if kind == "ivf_sq8" else faiss.IO_FLAG_MMAP_IFC
        expected = {"hnsw": "IndexHNSWFlat", "hnsw_sq8": "IndexHNSWSQ", "ivf_sq8": "IndexIVFScalarQuantizer"}
        if kind not in expected:
            raise IndexFolderError(f"{path.parent} has an index of kind {kind!r}; this version has {', '.join(KINDS)}")
        try:
            index = faiss.read_index(str(path), flag)
        except RuntimeError as error:
            raise IndexFolderError(
                f"faiss {faiss.__version__} cannot read {path}, which faiss {written_by} wrote: "
                f"{' '.join(str(error).split())[-200:]}"
            ) from error
        if type(index).__name__ != expected[kind]:
            raise IndexFolderError(f"{path} holds {type(index).__name__}, not {expected[kind]} ({kind})")
        return cls(index, kind, effort)

    @classmethod
    def build(
        cls,
        kind: str,
        shards: list[np.ndarray],
        *,
        show_progress: bool = True,
    ) -> AnnVectors:
        """Builds an index in memory; it takes :func:`file_bytes` and one shard in float32.

        Args:
            kind: hnsw, hnsw_sq8 or ivf_sq8.
            shards: [rows, dimension] each.
            show_progress: show a bar.
        """
        faiss = load_faiss()
        documents, dimension = sum(map(len, shards)), shards[0].shape[1]
        product, eight_bits = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer.QT_8bit
        lists = max(1, min(round(4 * documents**0.5), documents // _ROWS_PER_LIST))
        make: dict[str, Callable[[], Any]] = {
            "hnsw": lambda: faiss.IndexHNSWFlat(dimension, HNSW_NEIGHBOURS, product),
            "hnsw_sq8": lambda: faiss.IndexHNSWSQ(dimension, eight_bits, HNSW_NEIGHBOURS, product),
            "ivf_sq8": lambda: faiss.IndexIVFScalarQuantizer(
                faiss.IndexFlatIP(dimension), dimension, lists, eight_bits, product
            ),
        }
        index = make[kind]()
        if kind != "ivf_sq8":
            index.hnsw.efConstruction = HNSW_EF_CONSTRUCTION
        if not index.is_trained:
            index.train(_sample(shards, max(TRAINING_ROWS, lists * _ROWS_PER_LIST)))
        with tqdm(desc=kind, total=documents, unit=" vectors", unit_scale=True, disable=not show_progress) as bar:
            for block in _blocks(shards):
                index.add(block)
                bar.update(len(block))
        found = cls(index, kind, 0)
        found.effort = found.efforts[0]
        return found

    def save(self, path: Path) -> None:
        """Writes the index.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self._faiss.write_index(self._index, str(path))
        except RuntimeError as error:
            raise OSError(f"cannot write {path}: {' '.join(str(error).split())[-200:]}") from error

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows, each [queries, k], best first; row -1 where fewer were found."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self._kind == "ivf_sq8":
            parameters = self._faiss.SearchParametersIVF(nprobe=self.effort)
        else:
            parameters = self._faiss.SearchParametersHNSW(efSearch=self.effort)
        return self._index.search(queries, k, params=parameters)


def _blocks(shards: Iterable[np.ndarray], rows: int = 8192) -> Iterable[np.ndarray]:
    for shard in shards:
        for first in range(0, len(shard), rows):
            yield np.asarray(shard[first : first + rows], dtype=np.float32)


def _sample(shards: list[np.ndarray], rows: int) -> np.ndarray:
    """About ``rows`` rows, evenly spread."""
    step = max(1, sum(map(len, shards)) // rows)
    return np.concatenate([np.asarray(shard[::step], dtype=np.float32) for shard in shards])
