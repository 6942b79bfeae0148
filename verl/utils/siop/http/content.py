"""What a message says about its content, the same for servers and clients.

``Content-Digest`` (RFC 9530): a body that changed on its way is noticed, plausible numbers included.
``Content-Encoding: gzip`` of request bodies, offered by a server through ``Accept-Encoding`` (RFC 7694): token ids as
JSON shrink to less than half; one process spends about 10 ms on a megabyte.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import zlib
from collections.abc import Mapping

# Less than this fits one packet anyway.
MIN_COMPRESSED_BYTES = 1400


def content_digest(body: bytes) -> str:
    """Value of the ``Content-Digest`` field of a message with this body, by SHA-256."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def is_intact(body: bytes, field: str | None) -> bool:
    """Whether a body is the one its ``Content-Digest`` field was made of; true where the field has no SHA-256."""
    given = re.search(r"sha-256=:[^:]*:", field or "")
    return given is None or given[0] == content_digest(body)


def offers_gzip(headers: Mapping[str, str]) -> bool:
    """Whether the answer with these headers says that its server takes gzip bodies."""
    return "gzip" in headers.get("Accept-Encoding", "").lower().replace(" ", "").split(",")


def compress(body: bytes) -> bytes:
    """The body with gzip, at the fastest level."""
    return gzip.compress(body, compresslevel=1, mtime=0)


def decompress(body: bytes, max_bytes: int) -> bytes | None:
    """The body without gzip; None if it is larger than ``max_bytes``, of which no more is unpacked.

    Raises:
        ValueError: it is not one whole gzip member.
    """
    # By hand: ``gzip.decompress`` has no limit.
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        plain = unpacker.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"the body is not gzip: {error}") from error
    if len(plain) > max_bytes:
        return None
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("the body is not one whole gzip member")
    return plain
