"""Arrays in ``.npy`` files that are written piece by piece and read slice by slice, so that none has to fit memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from verl.utils.siop.retriever.corpus import CorpusError

Array = np.ndarray[Any, Any]


class ArrayFile:
    """A new ``.npy`` file of one axis.

    Args:
        path: of the file.
        dtype: of the elements.
        length: number of elements that will be appended.

    Raises:
        CorpusError: it cannot be written, for example because the disk is full; the message names it.
    """

    def __init__(self, path: Path, dtype: Any, length: int) -> None:
        self._path, self._dtype = path, np.dtype(dtype).newbyteorder("<")
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise self._failed(error) from error
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: Array) -> None:
        try:
            self._file.write(np.ascontiguousarray(values, self._dtype).data)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as failure:
            if kind is None:
                raise self._failed(failure) from failure

    def _failed(self, error: OSError) -> CorpusError:
        return CorpusError(f"cannot write {self._path}: {error.strerror or error}")


def write_array(path: Path, values: Array) -> None:
    """The whole of an array; errors as of :class:`ArrayFile`."""
    with ArrayFile(path, values.dtype, len(values)) as file:
        file.append(values)


def read_slice(path: Path, start: int = 0, stop: int | None = None) -> Array:
    """Part of an array, in memory; no page of the file stays mapped."""
    return np.array(np.load(path, mmap_mode="r")[start:stop])


def map_array(path: Path) -> Array:
    """The array, of which memory holds what is used."""
    return np.asarray(np.load(path, mmap_mode="r"))
