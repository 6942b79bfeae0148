"""``Content-Digest`` (RFC 9530): a message whose body changed on its way is noticed, plausible numbers included."""

from __future__ import annotations

import base64
import hashlib
import re


def content_digest(body: bytes | bytearray) -> str:
    """Value of the ``Content-Digest`` field of a message with this body, by SHA-256."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def is_intact(body: bytes | bytearray, field: str | None) -> bool:
    """Whether a body is the one its ``Content-Digest`` field was made of; true where the field has no SHA-256."""
    given = re.search(r"sha-256=:[^:]*:", field or "")
    return given is None or given[0] == content_digest(body)
