"""Builds an approximate index from the vectors of an exact one, and measures what it loses."""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from verl.utils.siop.retriever.ann import INDEX_FILE, KINDS, AnnVectors, file_bytes, load_faiss
from verl.utils.siop.retriever.corpus import CorpusError, CorpusFile, Document, unchanged
from verl.utils.siop.retriever.dense import (
    OFFSETS_FILE,
    PROBES_FILE,
    check_probes,
    choose_self_test,
    encoder_of,
    flat_shards,
    open_vectors,
    read_flat,
    read_offsets,
)
from verl.utils.siop.retriever.encoder import Encoder
from verl.utils.siop.retriever.folder import (
    IndexFolderError,
    Manifest,
    check_folder,
    check_target,
    identify_files,
    new_folder,
    write_manifest,
)
from verl.utils.siop.retriever.parts import locked_parts
from verl.utils.siop.retriever.vector_job import library_versions
from verl.utils.siop.retriever.vectors import Vectors

logger = logging.getLogger(__name__)

QUERIES, RECALL_AT = 1_000, (3, 10)
_SPAN_WORDS = 8
_TIMED = 100  # queries, one by one


def build_ann(
    source: Path,
    target: Path,
    kind: str,
    *,
    queries: Sequence[str] | None = None,
    recall: float = 0.95,
    corpus: Path | None = None,
    model: str | None = None,
    device: str = "cpu",
    show_progress: bool = True,
) -> Manifest:
    """Builds an index of ``kind`` in ``target`` from the flat one in ``source``.

    The effort of a search is doubled from its least until the recall at 10 is reached, or nothing is left out; what was
    measured on the way there goes into the manifest. Recall at k is the share of the k best of exact search that are
    among the k found, over all queries.

    Args:
        source: folder of a flat index.
        target: folder of the new one, which it replaces if it is an index of the same kind.
        kind: one of ``KINDS``.
        queries: to measure with; None for 1,000 spans of eight words from passages.
        recall: to be reached at 10.
        corpus, model: where corpus and encoder are, if they have moved.
        device: of the encoder and of exact search.
        show_progress: show bars.

    Raises:
        CorpusError: ``source`` is no flat index or is damaged, or ``target`` holds something else or cannot be written.
        EncoderError: no such encoder, or another one.
    """
    if kind not in KINDS:
        raise IndexFolderError(f"--kind {kind} is not one of {', '.join(KINDS)}")
    if target.resolve() == source.resolve():
        raise CorpusError(f"{target} holds the vectors that the new index is built from; choose another folder")
    if queries is not None and not queries:
        raise CorpusError("the file of queries is empty")
    if not 0 < recall <= 1:
        raise CorpusError(f"--recall is above 0 and at most 1, got {recall}")
    flat = read_flat(source)
    check_target(target, kind)
    identity = encoder_of(source, flat)
    corpus = corpus or Path(flat.corpus.path)
    with unchanged(corpus, "checked"):
        check_folder(source, flat, corpus, show_progress=show_progress)
        documents = CorpusFile(corpus, read_offsets(source, flat))
    encoder = Encoder.load_same(identity, model=model, device=device)
    check_probes(source, encoder, documents)
    exact = open_vectors(source, flat, identity.dimension, [device])
    needed = file_bytes(kind, len(documents), identity.dimension)
    built_with = load_faiss().__version__
    logger.info("%s of %d vectors: about %.2f GB in memory and in %s", kind, len(documents), needed / 1e9, target)

    with locked_parts(target) as (parts, _), new_folder(target, parts, kind) as folder:
        started = time.monotonic()
        built = AnnVectors.build(kind, flat_shards(source, flat, identity.dimension), show_progress=show_progress)
        seconds = time.monotonic() - started
        built.save(folder / INDEX_FILE)
        del built
        ann = AnnVectors.load(folder / INDEX_FILE, kind, 0, built_with)
        vectors = encoder.encode_queries(queries or spans(documents, QUERIES))
        measured = tune(ann, exact, vectors, recall)
        for name in (OFFSETS_FILE, PROBES_FILE):
            shutil.copyfile(source / name, folder / name)
        manifest = Manifest(
            kind=kind,
            corpus=flat.corpus.model_copy(update={"path": str(corpus.resolve())}),
            libraries={**library_versions(), "faiss": built_with},
            settings={**flat.settings, "effort": ann.effort},
            self_test=choose_self_test(encoder, ann, documents),
            measured={
                "build_seconds": round(seconds, 1),
                "queries": f"{len(vectors)} {'given' if queries else f'spans of {_SPAN_WORDS} words'}",
                **measured,
            },
            files=identify_files(folder, [folder / name for name in (INDEX_FILE, OFFSETS_FILE, PROBES_FILE)]),
        )
        write_manifest(folder, manifest)
    return manifest


def tune(ann: AnnVectors, exact: Vectors, queries: np.ndarray, recall: float) -> dict[str, Any]:
    """Sets the least effort with which the recall at 10 is reached, or the most; returns what was measured.

    Args:
        ann: its effort is set.
        exact: the same vectors.
        queries: [queries, dimension].
        recall: to be reached.
    """
    _, true = exact.search(queries, max(RECALL_AT))
    for effort in ann.efforts:
        ann.effort = effort
        _, found = ann.search(queries, max(RECALL_AT))
        at = {k: recall_at(true, found, k) for k in RECALL_AT}
        logger.info("effort %d: %s", effort, ", ".join(f"recall at {k} {at[k]:.4f}" for k in at))
        if at[max(RECALL_AT)] >= recall:
            break
    else:
        logger.warning("recall at %d stays at %.4f, below %g", max(RECALL_AT), at[max(RECALL_AT)], recall)
    return {
        "recall": {str(k): round(value, 4) for k, value in at.items()},
        "ms_per_query": round(_ms(ann.search, queries), 3),
        "exact_ms_per_query": round(_ms(exact.search, queries), 3),
    }


def recall_at(true: np.ndarray, found: np.ndarray, k: int) -> float:
    """Share of the first ``k`` rows of exact search that are among the first ``k`` found.

    Args:
        true, found: [queries, at least k] rows; fewer columns where there are fewer documents; -1 for none.
        k: rows of each query.
    """
    pairs = [(set(a[:k].tolist()), set(b[:k].tolist())) for a, b in zip(true, found, strict=True)]
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def spans(documents: Sequence[Document], count: int, seed: int = 0) -> list[str]:
    """Runs of eight words, each from a passage chosen at random."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = documents[rng.randrange(len(documents))]["contents"].split()
        first = rng.randrange(max(1, len(words) - _SPAN_WORDS + 1))
        found.append(" ".join(words[first : first + _SPAN_WORDS]))
    return found


def _ms(search: Callable[[np.ndarray, int], Any], queries: np.ndarray) -> float:
    timed = queries[:_TIMED]
    started = time.perf_counter()
    for query in timed:
        search(query[None], max(RECALL_AT))
    return (time.perf_counter() - started) / len(timed) * 1000
