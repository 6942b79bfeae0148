"""Corpora for the tests of BM25, and its formula, computed document by document."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from verl.utils.siop.retriever.bm25 import Bm25Index, tokenize


def random_passages(count: int, seed: int = 0) -> list[str]:
    """Of words of which few are frequent."""
    rng = random.Random(seed)
    return [" ".join(f"w{int(rng.paretovariate(0.7))}" for _ in range(rng.randint(5, 40))) for _ in range(count)]


def found(index: Bm25Index, query: str, k: int) -> list[str]:
    return [document["id"] for document, _ in index.search([query], k)[0]]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def brute_force(passages: Sequence[str], words: Sequence[str], k: int) -> list[tuple[int, float]]:
    """The k best passages by Lucene's BM25 (k1 = 1.2, b = 0.75), with impacts in 32 bits; equal ones in their order."""
    counts = [Counter(tokenize(text)) for text in passages]
    lengths = [sum(count.values()) for count in counts]
    mean = max(sum(lengths) / len(lengths), 1.0)
    frequency = Counter(word for count in counts for word in count)
    scores = []
    for count, length in zip(counts, lengths, strict=True):
        norm = 1.2 * (1 - 0.75 + 0.75 * length / mean)
        shared = [word for word in words if word in count]
        idf = {w: math.log1p((len(passages) - frequency[w] + 0.5) / (frequency[w] + 0.5)) for w in shared}
        scores.append(math.fsum(float(np.float32(idf[w] * count[w] / (count[w] + norm))) for w in shared))
    order = sorted(range(len(passages)), key=lambda i: -scores[i])
    return [(i, scores[i]) for i in order[:k] if scores[i] > 0]
