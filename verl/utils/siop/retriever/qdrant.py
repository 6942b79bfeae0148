"""The vectors of an index in Qdrant, a vector database: for corpora whose vectors do not fit one machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm
from verl.utils.siop.errors import ServiceUnavailable, SiopConfigError, SiopError

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

logger = logging.getLogger(__name__)

QDRANT = "qdrant"
BATCH = 512  # vectors of one request
TIMEOUT_S = 60
_CONTENT = "vectors_sha256"  # in the payload of point 0


class QdrantUnavailable(ServiceUnavailable):
    """The database did not answer."""

    service = "vector database"


def connect(url: str) -> QdrantClient:
    """A client of the database at ``url``; its key comes from ``QDRANT_API_KEY``.

    Raises:
        SiopConfigError: the extra ``qdrant`` is not installed.
    """
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise SiopConfigError(
            f"an index in Qdrant needs the extra 'qdrant' (pip install qdrant-client): {error}"
        ) from error
    return QdrantClient(url=url, api_key=os.environ.get("QDRANT_API_KEY"), timeout=TIMEOUT_S, check_compatibility=False)


class QdrantVectors:
    """Searches a collection whose points have the numbers of the documents.

    Args:
        client: of the database.
        collection: its name.
        exact: look at every vector; else along the graph that the database keeps, which may miss some.
    """

    def __init__(self, client: QdrantClient, collection: str, *, exact: bool = False) -> None:
        self._client, self._collection, self._exact = client, collection, exact

    def check(self, documents: int, dimension: int, sha256: str) -> None:
        """Compares size and content of the collection with the index's.

        Args:
            documents, dimension: number of the vectors, and of their numbers.
            sha256: that :func:`upload` was given.

        Raises:
            QdrantUnavailable: no answer.
            SiopError: no such collection, or it is not that of this index.
        """
        with _errors(self._client, self._collection):
            if not self._client.collection_exists(self._collection):
                raise SiopError(f"Qdrant has no collection {self._collection}; upload it again (build qdrant)")
            count = self._client.count(self._collection, exact=True).count
            vectors = self._client.get_collection(self._collection).config.params.vectors
        size = getattr(vectors, "size", None)
        if (count, size) != (documents, dimension):
            raise SiopError(
                f"Qdrant's collection {self._collection} has {count} vectors of {size} numbers, not {documents} of "
                f"{dimension}; upload it again (build qdrant)"
            )
        with _errors(self._client, self._collection):
            _check_content(self._client, self._collection, sha256)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows, each [queries, k], best first, equal scores by row; row -1 where there is none.

        Raises:
            QdrantUnavailable: no answer.
            SiopError: the database refused the search.
        """
        from qdrant_client import models

        params = models.SearchParams(exact=self._exact)
        requests = [models.QueryRequest(query=query.tolist(), limit=k, params=params) for query in queries]
        with _errors(self._client, self._collection):
            answers = self._client.query_batch_points(self._collection, requests=requests)
        scores, rows = np.zeros((len(queries), k), np.float32), np.full((len(queries), k), -1, np.int64)
        for i, answer in enumerate(answers):
            for j, point in enumerate(sorted(answer.points, key=lambda point: (-point.score, point.id))):
                scores[i, j], rows[i, j] = point.score, int(point.id)
        return scores, rows


def upload(
    client: QdrantClient, collection: str, shards: Sequence[np.ndarray], sha256: str, *, show_progress: bool = True
) -> None:
    """Fills a collection with vectors, numbered from shard to shard; what is already there is not sent again.

    Args:
        client: of the database.
        collection: its name; created where it is missing.
        shards: [rows, dimension] each.
        sha256: of what they hold; it is kept with the first point, by which the collection is known.
        show_progress: show a bar.

    Raises:
        QdrantUnavailable: no answer; the same call goes on from there.
        SiopError: the database refused, or the collection has other vectors.
    """
    from qdrant_client import models

    dimension, total = shards[0].shape[1], sum(map(len, shards))
    with _errors(client, collection):
        if not client.collection_exists(collection):
            client.create_collection(
                collection,
                vectors_config=models.VectorParams(size=dimension, distance=models.Distance.DOT, on_disk=True),
            )
        done = client.count(collection, exact=True).count
        found = getattr(client.get_collection(collection).config.params.vectors, "size", None)
        if done > total or found != dimension:
            raise SiopError(
                f"Qdrant's collection {collection} has {done} vectors of {found} numbers, and is not this index's "
                f"({total} of {dimension}); name another collection"
            )
        if done:
            _check_content(client, collection, sha256)
            if client.scroll(collection, offset=done, limit=1)[0]:
                done = 0  # a point is missing before this one
        with tqdm(desc="upload", total=total, initial=done, unit=" vectors", disable=not show_progress) as bar:
            for first, rows in _batches(shards, done):
                points = models.Batch(
                    ids=list(range(first, first + len(rows))),
                    vectors=rows.tolist(),
                    payloads=None if first else [{_CONTENT: sha256}, *[{}] * (len(rows) - 1)],
                )
                client.upsert(collection, points=points, wait=True)
                bar.update(len(rows))


def _check_content(client: QdrantClient, collection: str, sha256: str) -> None:
    first = next(iter(client.retrieve(collection, ids=[0], with_payload=True)), None)
    found = (first.payload or {}).get(_CONTENT) if first else None
    if found != sha256:
        raise SiopError(
            f"Qdrant's collection {collection} has the vectors of another index (sha256 {found}, not {sha256}); name "
            "another collection, or delete that one and upload again (build qdrant)"
        )


def _batches(shards: Sequence[np.ndarray], start: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows), from row ``start`` on."""
    first = 0
    for shard in shards:
        for row in range(max(0, start - first), len(shard), BATCH):
            yield first + row, np.asarray(shard[row : row + BATCH], np.float32)
        first += len(shard)


class _errors:
    """Turns the client's errors into ours, which name the database and the collection."""

    def __init__(self, client: QdrantClient, collection: str) -> None:
        self._where = f"{getattr(client, 'init_options', {}).get('url') or 'this process'} ({collection})"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

        if isinstance(error, UnexpectedResponse) and error.status_code is not None and error.status_code < 500:
            raise SiopError(f"Qdrant at {self._where} refused: {error}") from error
        if isinstance(error, ResponseHandlingException | ApiException):
            raise QdrantUnavailable(self._where, 1, str(error)) from error
