"""A dense index: passages ranked by the inner product of their vectors with the query's."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from verl.utils.siop.retriever.ann import INDEX_FILE, AnnVectors
from verl.utils.siop.retriever.corpus import CorpusFile, Document, unchanged
from verl.utils.siop.retriever.encoder import Encoder, EncoderIdentity, visible_devices
from verl.utils.siop.retriever.folder import MANIFEST, IndexFolderError, Manifest, check_folder, read_manifest
from verl.utils.siop.retriever.index import Hits
from verl.utils.siop.retriever.metrics import Metrics
from verl.utils.siop.retriever.qdrant import QDRANT, QdrantVectors, connect
from verl.utils.siop.retriever.vectors import FlatVectors, Vectors, open_shards

logger = logging.getLogger(__name__)

FLAT = "flat"
OFFSETS_FILE, PROBES_FILE = "offsets.npy", "probes.npy"
PROBE_QUERIES = (
    "who founded the company that built the first suspension bridge across the river",
    "In what year was the composer of the opera born?",
    "capital of France",
)
MIN_COSINE = 0.999
SELF_TEST = 20
_MARGIN = 0.01  # to the second best, so that rounding on another device does not decide


class DenseIndex:
    """Searches vectors of passages with the vector of a query.

    Args:
        encoder: makes vectors of queries.
        vectors: those of the documents, by their number.
        documents: the corpus.
        metrics: counts, if any.
    """

    def __init__(
        self, encoder: Encoder, vectors: Vectors, documents: Sequence[Document], metrics: Metrics | None = None
    ) -> None:
        self.encoder, self.vectors, self.documents = encoder, vectors, documents
        self._metrics = metrics or Metrics()

    def __len__(self) -> int:
        return len(self.documents)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` documents of each query with their cosines, best first; equal scores in corpus order.

        Raises:
            ValueError: ``k`` is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not queries:
            return []
        started = time.perf_counter()
        encoded = self.encoder.encode_queries(queries)
        searching = time.perf_counter()
        scores, rows = self.vectors.search(encoded, k)
        self._metrics.encode_seconds.observe(searching - started)
        self._metrics.search_seconds.observe(time.perf_counter() - searching)
        return [
            [(self.documents[int(row)], float(score)) for score, row in zip(*found, strict=True) if row >= 0]
            for found in zip(scores, rows, strict=True)
        ]


def load(
    folder: Path,
    *,
    corpus: Path | None = None,
    model: str | None = None,
    devices: Sequence[str] | None = None,
    metrics: Metrics | None = None,
    show_progress: bool = True,
) -> list[DenseIndex]:
    """Loads an index, one for each device, after every check that it is whole and that its parts belong together.

    Args:
        folder: of the index.
        corpus: where the corpus is, if it has moved.
        model: where the encoder is, if it has moved.
        devices: as ``cuda:0``; None for all visible GPUs, or the CPU if there is none.
        metrics: counts, if any.
        show_progress: show a bar while files are read.

    Raises:
        IndexFolderError: a file, the corpus, the order of the vectors is not what it was.
        EncoderError: no such encoder, or another one.
    """
    manifest = read_manifest(folder)
    names = visible_devices(devices)
    identity = encoder_of(folder, manifest)
    corpus = corpus or Path(manifest.corpus.path)
    with unchanged(corpus, "checked"):
        check_folder(folder, manifest, corpus, show_progress=show_progress)
        documents = CorpusFile(corpus, read_offsets(folder, manifest))
    encoders = [Encoder.load_same(identity, model=model, device=name) for name in names]
    for encoder in encoders:
        check_probes(folder, encoder, documents)
    vectors = open_vectors(folder, manifest, identity.dimension, names)
    if wrong := self_test(encoders[0], vectors, documents, manifest.self_test):
        raise IndexFolderError(
            f"the vectors in {folder} and the passages of {corpus} do not belong together: {len(wrong)} of "
            f"{len(manifest.self_test)} passages are not found by their own text ({'; '.join(wrong[:3])}); build the "
            "index again"
        )
    return [DenseIndex(encoder, vectors, documents, metrics) for encoder in encoders]


def encoder_of(folder: Path, manifest: Manifest) -> EncoderIdentity:
    """The encoder that an index was built with.

    Raises:
        IndexFolderError: it has none, as BM25.
    """
    try:
        return EncoderIdentity.model_validate(manifest.settings["encoder"])
    except (KeyError, ValueError) as error:
        raise IndexFolderError(
            f"the index in {folder} ({manifest.kind}) has no encoder: it is no dense index"
        ) from error


def open_vectors(folder: Path, manifest: Manifest, dimension: int, devices: Sequence[str]) -> Vectors:
    """The vectors of an index: memory-mapped, on GPUs, or in a database.

    Raises:
        IndexFolderError: they cannot be read, or are not as many as there are documents.
    """
    documents = manifest.corpus.documents
    if manifest.kind == FLAT:
        return FlatVectors(flat_shards(folder, manifest, dimension), devices)
    settings = manifest.settings
    if manifest.kind == QDRANT:
        elsewhere = QdrantVectors(connect(str(settings["url"])), str(settings["collection"]))
        elsewhere.check(documents, dimension, str(settings.get("vectors_sha256")))
        return elsewhere
    effort = settings.get("effort")
    ann = AnnVectors.load(folder / INDEX_FILE, manifest.kind, 0, manifest.libraries.get("faiss", "?"))
    if not isinstance(effort, int) or effort not in ann.efforts:
        allowed = ", ".join(map(str, ann.efforts))
        raise IndexFolderError(f"{folder / MANIFEST}: settings.effort is {effort!r}; {manifest.kind} has {allowed}")
    ann.effort = effort
    if (ann.count, ann.dimension) != (documents, dimension):
        raise IndexFolderError(
            f"{folder / INDEX_FILE} has {ann.count} vectors of {ann.dimension} numbers, not {documents} of {dimension}"
        )
    return ann


def read_flat(folder: Path) -> Manifest:
    """The manifest of a flat index, from whose vectors another kind is to be made.

    Raises:
        IndexFolderError: it is of another kind, or none.
    """
    manifest = read_manifest(folder)
    if manifest.kind != FLAT:
        raise IndexFolderError(
            f"{folder} holds an index of kind {manifest.kind}; only one of kind {FLAT} has the vectors"
        )
    return manifest


def flat_shards(folder: Path, manifest: Manifest, dimension: int) -> list[np.ndarray]:
    """[rows, dimension] each: the vectors of a flat index, memory-mapped; errors as of :func:`open_shards`."""
    paths = sorted(folder / name for name in manifest.files if name.endswith(".f16.npy"))
    return open_shards(paths, manifest.corpus.documents, dimension)


def read_offsets(folder: Path, manifest: Manifest) -> np.ndarray:
    """[documents] first byte of each document of the corpus.

    Raises:
        IndexFolderError: they are not as many.
    """
    offsets = np.load(folder / OFFSETS_FILE, mmap_mode="r")
    if offsets.shape != (manifest.corpus.documents,):
        raise IndexFolderError(f"{folder / OFFSETS_FILE} has {len(offsets)} rows, not {manifest.corpus.documents}")
    return offsets


def probe_rows(documents: int) -> list[int]:
    """Numbers of the passages that the encoder is recognised by: the first, middle and last."""
    return sorted({0, documents // 2, documents - 1})


def probe_vectors(encoder: Encoder, passages: Sequence[str]) -> np.ndarray:
    """[probes, dimension] vectors of :data:`PROBE_QUERIES` and then of these passages."""
    return np.concatenate([encoder.encode_queries(PROBE_QUERIES), encoder.encode_passages(passages)])


def check_probes(folder: Path, encoder: Encoder, documents: Sequence[Document]) -> None:
    """Compares vectors that the encoder gives now with those that it gave when the index was built.

    Raises:
        IndexFolderError: a cosine is below .999.
    """
    stored = np.load(folder / PROBES_FILE)
    passages = [documents[row]["contents"] for row in probe_rows(len(documents))]
    found = probe_vectors(encoder, passages)
    if found.shape != stored.shape:
        raise IndexFolderError(f"{folder / PROBES_FILE} is {list(stored.shape)}, expected {list(found.shape)}")
    cosines = (found * stored).sum(axis=1)
    for what, part, prompt in (
        ("queries", cosines[: len(PROBE_QUERIES)], encoder.identity.query_prompt),
        ("passages", cosines[len(PROBE_QUERIES) :], encoder.identity.passage_prompt),
    ):
        if part.min() < MIN_COSINE:
            raise IndexFolderError(
                f"the encoder {encoder.identity.model} does not give the vectors of {what} that the index in {folder} "
                f"was built with: cosine {part.min():.4f}, at least {MIN_COSINE} is expected; another prefix "
                f"({prompt!r} now), tokenizer, pooling or model"
            )


def choose_self_test(encoder: Encoder, vectors: Vectors, documents: Sequence[Document]) -> list[int]:
    """Numbers of up to 20 passages, spread over the corpus, that their own text finds clearly before all others.

    Raises:
        IndexFolderError: fewer than half of those tried are found at all.
    """
    tried = np.unique(np.linspace(0, len(documents) - 1, 2 * SELF_TEST).astype(int)).tolist()
    texts = [documents[row]["contents"] for row in tried]
    scores, rows = vectors.search(encoder.encode_passages(texts), 2)
    wrong = [_wrong(int(row), found, documents) for row, found in zip(tried, rows[:, 0], strict=True)]
    if len(missed := [text for text in wrong if text]) * 2 > len(tried):
        raise IndexFolderError(
            f"vectors and passages do not belong together: {len(missed)} of {len(tried)} passages are not found by "
            f"their own text ({'; '.join(missed[:3])})"
        )
    clear = [
        row
        for row, text, found in zip(tried, wrong, scores, strict=True)
        if not text and (len(found) < 2 or found[0] - found[1] >= _MARGIN)
    ]
    clear = clear or [row for row, text in zip(tried, wrong, strict=True) if not text]
    return clear[:: -(-len(clear) // SELF_TEST)]


def self_test(encoder: Encoder, vectors: Vectors, documents: Sequence[Document], rows: Sequence[int]) -> list[str]:
    """Which of these passages are not found first by their own text, or one equal to it, as text for people."""
    texts = [documents[row]["contents"] for row in rows]
    _, found = vectors.search(encoder.encode_passages(texts), 1)
    return [text for row, best in zip(rows, found[:, 0], strict=True) if (text := _wrong(row, best, documents))]


def _wrong(row: int, best: Any, documents: Sequence[Document]) -> str:
    if best >= 0 and documents[row]["contents"] == documents[int(best)]["contents"]:
        return ""
    return f"document {row} finds {f'document {best}' if best >= 0 else 'none'}"
