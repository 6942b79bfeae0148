"""MessagePack request bodies: less to send than JSON, and next to nothing to parse.

A body is what the JSON one would be, and a list of token ids may be of extension type 2, 3 or 4: little-endian numbers
of so many bytes each. A server offers it through ``Accept`` (RFC 9110 section 12.5.1). For clients too: nothing of a
server is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from msgpack import ExtType as PackedIds

MEDIA_TYPE = "application/msgpack"
MAX_ID = 2**31 - 1
_WIDTHS = (2, 3, 4)
_TOKEN_BYTES = 5  # at most, of an id in a list


def is_packed(content_type: str | None) -> bool:
    """Whether a body with this ``Content-Type`` is MessagePack."""
    return (content_type or "").partition(";")[0].strip().lower() == MEDIA_TYPE


def offers_packed(headers: Mapping[str, str]) -> bool:
    """Whether the answer with these headers says that its server takes MessagePack."""
    return any(is_packed(kind) for kind in headers.get("Accept", "").split(","))


def pack_ids(ids: Sequence[int]) -> PackedIds | Sequence[int]:
    """Token ids as they go into a body; those that are none stay as they are, for the server to name their place."""
    numbers = np.asarray(ids)
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() > MAX_ID):
        return ids
    width = next(width for width in _WIDTHS if not numbers.size or numbers.max() < 2 ** (8 * width))
    return PackedIds(width, numbers.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes())


def unpack_ids(packed: PackedIds) -> np.ndarray:
    """The ids of :func:`pack_ids`, int64.

    Raises:
        ValueError: they are none.
    """
    width, data = packed
    if width not in _WIDTHS or len(data) % width:
        raise ValueError(f"{len(data)} bytes of extension type {width} are no token ids")
    ids = np.zeros((len(data) // width, 4), np.uint8)
    ids[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
    numbers = ids.view("<u4")[:, 0].astype(np.int64)
    if numbers.size and numbers.max() > MAX_ID:
        raise ValueError(f"{numbers.max()} is no token id (0..{MAX_ID})")
    return numbers


def pack(body: Mapping[str, Any]) -> bytes:
    """A body as MessagePack."""
    return msgpack.packb(body)


def spans(body: bytes, field: str, max_items: int) -> list[tuple[int, int]] | None:
    """Start and end of each element of a body ``{field: [element, …]}``, none of them parsed; None if there are more
    than ``max_items``.

    Raises:
        ValueError: it is not such a body.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(body)))
    unpacker.feed(body)
    try:
        if unpacker.read_map_header() != 1 or unpacker.unpack() != field:
            raise ValueError(f"it is not a map of {field!r} alone")
        if (count := unpacker.read_array_header()) > max_items:
            return None
        found = []
        for _ in range(count):
            start = unpacker.tell()
            unpacker.skip()
            found.append((start, unpacker.tell()))
    except (msgpack.UnpackException, ValueError) as error:
        raise ValueError(f"the body is not MessagePack of this form: {error or type(error).__name__}") from error
    if unpacker.tell() != len(body):
        raise ValueError(f"{len(body) - unpacker.tell()} bytes follow the MessagePack body")
    return found


def element(data: bytes) -> Any:
    """One element of :func:`spans`.

    Raises:
        ValueError: it cannot be unpacked, as text that is not UTF-8.
    """
    try:
        return msgpack.unpackb(data)
    except (msgpack.UnpackException, ValueError) as error:
        raise ValueError(f"it cannot be unpacked: {error or type(error).__name__}") from error


def most_bytes(num_tokens: int, spare: int) -> int:
    """Length of the longest element with so many tokens, and ``spare`` other numbers."""
    return _TOKEN_BYTES * (num_tokens + spare)
