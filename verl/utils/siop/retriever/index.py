"""What the retriever service needs of an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from verl.utils.siop.errors import SiopError
from verl.utils.siop.retriever.corpus import Document

Hits = list[tuple[Document, float]]


class Index(Protocol):
    """BM25, dense, or one elsewhere."""

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` documents of each query with their scores, best first; fewer if fewer match."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...


class SearchFailed(SiopError, RuntimeError):
    """An index could not answer; the message says why (HTTP 500)."""
