"""The search of BM25: exactly the best documents, without a look at those that cannot be among them.

A word has a bound, its largest impact on any document. Once k documents reach a score (the threshold), a document that
has none of the rarer words of a query cannot be among the best if the bounds of the other words sum up to less.
Frequent words are then looked up in the documents that have rarer ones, and most of what they list is never read
(MaxScore, Turtle and Flood 1995).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from verl.utils.siop.retriever.bm25_files import Array, map_array
from verl.utils.siop.retriever.bm25_words import key_of

_WINDOW = 2**17  # documents whose scores fit the cache of a core
_SPARSE = 64  # one posting in so many documents: sorting them is faster than an array over all documents
_SLACK = 1 - 1e-9  # bounds are added up in another order than scores


class _Term(NamedTuple):
    """A word of a query: documents ascending, its impact on each, how often the query has it; the most that it adds."""

    documents: Array
    impacts: Array
    weight: int
    bound: float


class _Scored(NamedTuple):
    """Documents, ascending, and their scores."""

    documents: Array
    scores: Array


class Postings:
    """The arrays of an index (:func:`merge`).

    Args:
        folder: of their files.
        documents: how many there are.
        in_memory: read them instead of mapping the files.
    """

    def __init__(self, folder: Path, documents: int, *, in_memory: bool = False) -> None:
        read = np.load if in_memory else map_array
        self._size = documents
        self._keys, self._starts, self._documents, self._impacts, self._bounds = (
            read(folder / f"{name}.npy") for name in ("keys", "starts", "documents", "impacts", "bounds")
        )

    def top(self, words: Sequence[str], k: int) -> list[tuple[int, float]]:
        """The ``k`` documents with the highest sum of the words' impacts, and the sum; equal ones in their order.

        A word that is there n times counts n times. Documents without any of the words are never among them.
        """
        terms = self._terms(words)
        if not terms:
            return []
        # rest[i]: the most that the words from i on can add.
        rest = np.append(np.cumsum([term.bound for term in terms][::-1])[::-1], 0.0)
        postings = np.cumsum([len(term.documents) for term in terms])
        threshold = self._first_threshold(terms, rest, postings, k)
        needed = _needed(rest, threshold)
        few = postings[needed - 1] * _SPARSE <= self._size
        edges = np.array([0, self._size]) if few else np.append(np.arange(0, self._size, _WINDOW), self._size)
        cuts = np.array([np.searchsorted(term.documents, edges) for term in terms])
        best = _Scored(np.empty(0, np.int64), np.empty(0))
        for window in range(len(edges) - 1):
            needed = _needed(rest, threshold)
            found = _sum(terms[:needed], cuts[:needed, window], cuts[:needed, window + 1], edges[window : window + 2])
            found = _complete(found, terms[needed:], rest[needed:], threshold)
            best = _best(_Scored(*(np.concatenate(pair) for pair in zip(best, found, strict=True))), k)
            threshold = _threshold(best, k)
        return [(int(document), float(score)) for document, score in zip(*best, strict=True)]

    def _terms(self, words: Sequence[str]) -> list[_Term]:
        """The words that the index has, those first that can add most."""
        keys = Counter(map(key_of, words))
        wanted = np.fromiter(keys, np.uint64, len(keys))
        places = np.searchsorted(self._keys, wanted)
        terms = []
        for key, place in zip(keys, places.tolist(), strict=True):
            if place < len(self._keys) and self._keys[place] == key:
                low, high = self._starts[place : place + 2]
                bound = keys[key] * float(self._bounds[place])
                terms.append(_Term(self._documents[low:high], self._impacts[low:high], keys[key], bound))
        return sorted(terms, key=lambda term: -term.bound)

    def _first_threshold(self, terms: Sequence[_Term], rest: Array, postings: Array, k: int) -> float:
        """A score that k documents reach, from those that have the rarest words; 0 if there are too few of them."""
        rare = int(np.searchsorted(postings * _SPARSE, self._size, "right"))
        if not rare:
            return 0.0
        stops = np.array([len(term.documents) for term in terms[:rare]])
        found = _best(_sum(terms[:rare], 0 * stops, stops, np.array([0, self._size])), max(k, 64))
        order = np.argsort(found.documents)
        found = _complete(_Scored(found.documents[order], found.scores[order]), terms[rare:], rest[rare:], 0.0)
        return _threshold(_best(found, k), k)


def _needed(rest: Array, threshold: float) -> int:
    """How many words: a document that has none of them cannot reach the threshold."""
    return max(1, int(np.count_nonzero(rest[:-1] >= threshold * _SLACK)))


def _threshold(best: _Scored, k: int) -> float:
    return float(best.scores[-1]) if len(best.scores) == k else 0.0


def _best(found: _Scored, k: int) -> _Scored:
    """The k best, best first."""
    if len(found.scores) > k:
        # Everything at least as good as the k-th, so that a tie at the cut is decided by the order.
        cut = np.partition(found.scores, -k)[-k]
        found = _Scored(*(values[found.scores >= cut] for values in found))
    order = np.lexsort((found.documents, -found.scores))[:k]
    return _Scored(found.documents[order], found.scores[order])


def _sum(terms: Sequence[_Term], starts: Array, stops: Array, edges: Array) -> _Scored:
    """Scores by these words of the documents in a window; a word's are between its start and its stop."""
    parts = [(term, slice(a, b)) for term, a, b in zip(terms, starts, stops, strict=True) if a < b]
    if not parts:
        return _Scored(np.empty(0, np.int64), np.empty(0))
    documents = np.concatenate([term.documents[part] for term, part in parts])
    impacts = np.concatenate([np.multiply(term.impacts[part], term.weight, dtype=np.float64) for term, part in parts])
    low, high = edges
    if len(documents) * _SPARSE <= high - low:
        documents, places = np.unique(documents, return_inverse=True)
        return _Scored(documents.astype(np.int64), np.bincount(places, impacts))
    scores = np.bincount(documents - low, impacts)
    documents = np.flatnonzero(scores)
    return _Scored(documents + low, scores[documents])


def _complete(found: _Scored, terms: Sequence[_Term], rest: Array, threshold: float) -> _Scored:
    """Add the other words; a document is dropped as soon as it cannot reach the threshold."""
    for term, left in zip(terms, rest, strict=False):
        hopeful = found.scores + left >= threshold * _SLACK
        documents, scores = found.documents[hopeful], found.scores[hopeful]
        places = np.minimum(np.searchsorted(term.documents, documents), len(term.documents) - 1)
        hits = term.documents[places] == documents
        scores[hits] += np.multiply(term.impacts[places[hits]], term.weight, dtype=np.float64)
        found = _Scored(documents, scores)
    return found
