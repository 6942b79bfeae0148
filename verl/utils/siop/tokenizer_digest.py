"""Digest of what token ids mean, so that two processes that exchange ids can tell whether they mean the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over the map of ids to tokens, added tokens among them.

    How text is split into tokens does not count: ids are exchanged, never text.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        64 hexadecimal digits; equal if and only if both tokenizers map the same ids to the same tokens.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index} {json.dumps(token)}\n".encode())
    return digest.hexdigest()


def largest_id(tokenizer: Any) -> int:
    """The largest id that the tokenizer can give, -1 if it has no tokens."""
    return max(tokenizer.get_vocab().values(), default=-1)
