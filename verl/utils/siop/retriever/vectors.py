"""Vectors in shards on disk, and exact search among them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from verl.utils.siop.retriever.corpus import CorpusError
from verl.utils.siop.retriever.folder import FileIdentity, IndexFolderError, shard_name, write_whole

SHARD_ROWS = 65_536
# Rows that are widened to float32 at once: on a CPU so few that they stay in its cache.
CPU_BLOCK_ROWS, GPU_BLOCK_ROWS = 1_024, 65_536
# Products with fewer rows of queries, or a number between, or of a block that is not whole, sum in an order that
# depends on a vector's place: equal vectors would get scores that differ in their last digit.
_QUERY_ROWS = 4
_ROW_BITS = 32
_LAST_ROW = 2**_ROW_BITS - 1
_SPARE_GPU_BYTES = 2**31  # for scores and what else shares the GPU


class Vectors(Protocol):
    """The vectors of the passages, to be searched."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows, each [queries, at most k], best first; row -1 where there is none."""
        ...


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard of an index."""
    return folder / shard_name(number)


def write_shard(path: Path, vectors: np.ndarray) -> FileIdentity:
    """Writes [rows, dimension] vectors as float16, whole or not at all; returns what identifies the file.

    Raises:
        CorpusError: it cannot be written, as on a full disk.
    """
    return write_array(path, vectors.astype(np.float16))


def write_array(path: Path, array: np.ndarray) -> FileIdentity:
    """Writes an array, whole or not at all; returns what identifies the file.

    Raises:
        CorpusError: it cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, array)
    data = buffer.getbuffer()
    write_whole(path, data)
    return FileIdentity(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def open_shards(paths: Sequence[Path], documents: int, dimension: int) -> list[np.ndarray]:
    """Memory maps of all shards.

    Raises:
        IndexFolderError: one cannot be read, or they do not hold ``documents`` vectors of ``dimension`` numbers.
    """
    shards = []
    for path in paths:
        try:
            # Copy on write: torch warns of arrays that cannot be written.
            shard = np.load(path, mmap_mode="c")
        except (OSError, ValueError, EOFError) as error:
            raise IndexFolderError(f"{path} is damaged: {error}") from error
        if shard.dtype != np.float16 or shard.ndim != 2 or shard.shape[1] != dimension:
            raise IndexFolderError(f"{path} holds {shard.dtype}{list(shard.shape)}, not float16[rows, {dimension}]")
        shards.append(shard)
    if (found := sum(map(len, shards))) != documents:
        raise IndexFolderError(f"{paths[0].parent if paths else 'the index'} has {found} vectors, not {documents}")
    return shards


class FlatVectors:
    """Exact search: the inner product with every vector, in float32.

    Vectors are float16. On GPUs they lie in memory, spread evenly; on a CPU they stay in their memory-mapped files.
    Equal scores come in the order of the rows.

    Args:
        shards: [rows, dimension] each; their rows are numbered through.
        devices: GPUs, or ``cpu`` alone.

    Raises:
        CorpusError: the GPUs have too little memory.
    """

    def __init__(self, shards: Sequence[np.ndarray], devices: Sequence[str] = ("cpu",)) -> None:
        self._parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
        gpus = [device for device in devices if device != "cpu"]
        if gpus:
            _check_memory(shards, gpus)
        start = 0
        for number, shard in enumerate(shards):
            device = gpus[number * len(gpus) // len(shards)] if gpus else "cpu"
            self._parts.setdefault(device, []).append((start, torch.from_numpy(shard).to(device)))
            start += len(shard)
        if start > _LAST_ROW:
            raise CorpusError(f"{start} vectors are more than {_LAST_ROW}")

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows, each [queries, min(k, vectors)], best first."""
        asked = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
        asked = torch.nn.functional.pad(asked, (0, 0, 0, -len(asked) % _QUERY_ROWS))
        # One loop for all devices: GPUs work on while the next is given its part.
        found = [
            best_keys(_blocks(part), asked.to(device), k, _block_rows(device)) for device, part in self._parts.items()
        ]
        keys = torch.cat([keys.cpu() for keys in found], dim=1)
        return scores_and_rows(keys.topk(min(k, keys.shape[1])).values[: len(queries)])


def best_keys(
    blocks: Iterable[tuple[int, torch.Tensor]], queries: torch.Tensor, k: int, block_rows: int = 0
) -> torch.Tensor:
    """Keys of the ``k`` best rows of each query: one int64 that orders by score, then by row.

    Args:
        blocks: number of the first row, and vectors [rows, dimension].
        queries: [queries, dimension] float32, on the device of the blocks.
        k: fewer are found if there are fewer rows.
        block_rows: shorter blocks are multiplied as if they had so many, so that equal vectors get equal scores.

    Returns:
        [queries, at most k] int64.
    """
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start, block in blocks:
        wide = torch.nn.functional.pad(block.float(), (0, 0, 0, max(0, block_rows - len(block))))
        # + 0: -0.0 is another float than 0.0, but no other score.
        bits = ((queries @ wide.T)[:, : len(block)] + 0.0).view(torch.int32)
        rows = torch.arange(start, start + len(block), device=queries.device)
        keys = (_ordered(bits).long() << _ROW_BITS) | (_LAST_ROW - rows)
        best = torch.cat([best, keys.topk(min(k, len(block))).values], dim=1)
        best = best.topk(min(k, best.shape[1])).values
    return best


def scores_and_rows(keys: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What keys of :func:`best_keys` stand for: float32 and int64, both in the shape of the keys."""
    scores = _ordered((keys >> _ROW_BITS).int()).view(torch.float32)
    return scores.numpy(), (_LAST_ROW - (keys & _LAST_ROW)).numpy()


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Maps the bits of a float32 to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _blocks(part: Sequence[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    for start, shard in part:
        rows = _block_rows(shard.device.type)
        for first in range(0, len(shard), rows):
            yield start + first, shard[first : first + rows]


def _block_rows(device: str) -> int:
    return CPU_BLOCK_ROWS if device == "cpu" else GPU_BLOCK_ROWS


def _check_memory(shards: Sequence[np.ndarray], gpus: Sequence[str]) -> None:
    needed = sum(shard.nbytes for shard in shards) / len(gpus)
    for device in gpus:
        free, _ = torch.cuda.mem_get_info(device)
        if needed + _SPARE_GPU_BYTES > free:
            raise CorpusError(
                f"{device} has {free / 1e9:.1f} GB free, and its share of the vectors takes {needed / 1e9:.1f} GB and "
                f"{_SPARE_GPU_BYTES / 1e9:.1f} GB to work with; give more GPUs, or --devices cpu, or build a smaller "
                "index: retriever.build index --kind hnsw_sq8"
            )
