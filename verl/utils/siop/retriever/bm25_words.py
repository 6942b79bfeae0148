"""What BM25 takes for a word, and the key of 64 bits that stands for it in the files of an index."""

from __future__ import annotations

import hashlib
import re
import unicodedata

_WORD = re.compile(r"\w+")
TOKENIZER = r"lower-case runs of \w"
UNICODE = unicodedata.unidata_version


def tokenize(text: str) -> list[str]:
    """Lower-case runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


# Lucene's for English.
STOP_WORDS = frozenset(
    tokenize(
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
        "this to was will with"
    )
)


def query_words(text: str) -> list[str]:
    """The words of a query without stop words, or with them if there is nothing else."""
    words = tokenize(text)
    return [word for word in words if word not in STOP_WORDS] or words


def key_of(text: str) -> int:
    """The first 64 bits of BLAKE2b.

    An index knows words by their keys alone, so that the vocabulary is an array: no table of strings that grows with
    the corpus. Among ten million words, two share a key with probability 3e-6; they are then one word.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
