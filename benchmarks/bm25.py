"""BM25 over made-up corpora: what building takes and what a query takes, against bm25s in the same run.

    python benchmarks/bm25.py [--passages 300000 1000000 3000000] [--baseline 300000] [--folder /tmp]

A passage has about 100 words. Ranks follow Zipf's law with exponent 1 up to rank 20,000 and 1.7 beyond it, over
ten million words, the first of which are stop words: six million of them are in 21 million passages. Every build and
every search has a process of its own. Times are of the processor, on one core, so that others on the machine matter
less; memory is the peak of the process before it maps the index, some 0.5 GB of which are imports.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from verl.utils.siop.retriever.bm25 import Bm25Index
from verl.utils.siop.retriever.bm25_estimate import estimate
from verl.utils.siop.retriever.bm25_words import STOP_WORDS, query_words, tokenize
from verl.utils.siop.retriever.folder import read_manifest

WIKI, VOCABULARY, K = 21_015_324, 10_000_000, 3
_BEND = 20_000
_SYLLABLES = [consonant + vowel for consonant in "bcdfghklmnprstvz" for vowel in "aeiou"]


def word(rank: int) -> str:
    """The word of a rank: a stop word, or syllables."""
    if rank < len(STOP_WORDS):
        return sorted(STOP_WORDS)[rank]
    name, rank = "", rank + 1
    while rank:
        rank, syllable = divmod(rank, len(_SYLLABLES))
        name += _SYLLABLES[syllable]
    return name


def write_corpus(path: Path, passages: int, seed: int = 0) -> None:
    """A corpus; the first passages are the same for every size."""
    rng = np.random.default_rng(seed)
    ranks = np.arange(VOCABULARY) + 2.7
    cumulative = np.cumsum(np.where(ranks < _BEND, 1 / ranks, _BEND**0.7 / ranks**1.7))
    names = [word(rank) for rank in range(500_000)]
    with path.open("w") as file:
        for number in tqdm(range(passages), desc=f"write {path.name}", unit_scale=True, mininterval=2):
            drawn = np.searchsorted(cumulative, rng.random(max(20, int(rng.normal(100, 12)))) * cumulative[-1])
            text = " ".join([names[rank] if rank < len(names) else word(rank) for rank in drawn.tolist()])
            file.write(f'{{"id": "{number}", "contents": "{text}"}}\n')


def queries(corpus: Path, count: int, seed: int = 1) -> dict[str, list[str]]:
    """Of eight words of one passage each, and of four frequent words that are no stop words."""
    rng = np.random.default_rng(seed)
    with corpus.open() as file:
        texts = [json.loads(line)["contents"].split() for line, _ in zip(file, range(count), strict=False)]
    frequent = range(len(STOP_WORDS), 1000)
    return {
        "of a passage": [" ".join(rng.choice(text, 8, replace=False)) for text in texts],
        "of frequent words": [" ".join(word(rank) for rank in rng.choice(frequent, 4)) for _ in texts],
    }


def apart(task: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """Result of a task in a process of its own, its seconds of the processor, and its peak of memory in bytes."""
    receive, send = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_run, args=(send, task, *args))
    process.start()
    send.close()
    try:
        return receive.recv()
    finally:
        process.join()


def _run(send: Any, task: Callable[..., Any], *args: Any) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    before = time.process_time()
    result = task(*args)
    seconds = time.process_time() - before
    status = Path("/proc/self/status").read_text()
    send.send((result, seconds, 1024 * int(status.split("VmHWM:")[1].split()[0])))


def build(corpus: Path, folder: Path) -> int:
    Bm25Index.build(corpus, folder)
    return read_manifest(folder).measured["peak_mb"]


def search(folder: Path, asked: dict[str, list[str]]) -> dict[str, Any]:
    index = Bm25Index.load(folder)
    return _timed(lambda query: [score for _, score in index.search([query], K)[0]], asked)


def build_bm25s(corpus: Path, folder: Path) -> None:
    bm25s = _bm25s()
    vocabulary: dict[str, int] = {}

    def tokens() -> Iterator[np.ndarray]:
        with corpus.open() as file:
            for line in file:
                words = tokenize(json.loads(line)["contents"])
                yield np.asarray([vocabulary.setdefault(w, len(vocabulary)) for w in words], dtype=np.int32)

    index = bm25s.BM25(k1=1.2, b=0.75, method="lucene", backend="numpy")
    index.index((list(tokens()), vocabulary), create_empty_token=False, show_progress=True)
    index.save(folder, show_progress=False)


def search_bm25s(folder: Path, asked: dict[str, list[str]]) -> dict[str, Any]:
    index = _bm25s().BM25.load(folder, mmap=True, load_corpus=False, show_progress=False)

    def scores(query: str) -> list[float]:
        words = [query_words(query)]
        return index.retrieve(words, k=K, show_progress=False, n_threads=0).scores[0].tolist()

    return _timed(scores, asked)


def _bm25s() -> Any:
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _timed(scores_of: Callable[[str], list[float]], asked: dict[str, list[str]]) -> dict[str, Any]:
    """Of each kind of queries: ms of the processor of each, and scores. The first round warms the page cache."""
    found = {}
    for kind, texts in asked.items():
        for text in texts:
            scores_of(text)
        times, scores = [], []
        for text in texts:
            before = time.process_time()
            scores.append(scores_of(text))
            times.append(1000 * (time.process_time() - before))
        found[kind] = (times, scores)
    return found


def measure(name: str, builder: Any, searcher: Any, corpus: Path, asked: dict[str, list[str]]) -> dict[str, Any]:
    """A row of the table."""
    folder = corpus.with_name(f"{corpus.name}.{name}")
    peak_mb, seconds, memory = apart(builder, corpus, folder)
    memory = memory if peak_mb is None else peak_mb * 2**20
    size = sum(path.stat().st_size for path in folder.iterdir())
    found, _, _ = apart(searcher, folder, asked)
    times = {kind: np.percentile(times, [50, 99]) for kind, (times, _) in found.items()}
    scores = {kind: scores for kind, (_, scores) in found.items()}
    return {"name": name, "seconds": seconds, "memory": memory, "size": size, "times": times, "scores": scores}


def line(passages: int, row: dict[str, Any], factor: float = 1.0) -> str:
    times = "  ".join(f"{p50 * factor:9.2f} {p99 * factor:9.2f}" for p50, p99 in row["times"].values())
    memory = f"{row['memory'] / 1e9:9.2f}" if factor == 1 else " " * 9
    return (
        f"{passages:>10,} {row['name']:>6} {row['seconds'] * factor:9.0f} {memory} {row['size'] * factor / 1e9:9.2f}  "
        f"{times}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[300_000, 1_000_000, 3_000_000])
    what = "bm25s too, up to so many passages (it takes 5 GB of memory a million)"
    parser.add_argument("--baseline", type=int, default=300_000, help=what)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", help="of a temporary folder for corpora and indexes, 2 GB a million passages")
    args = parser.parse_args(argv)
    print("  passages  index   build s   peak GB  index GB    query ms of a passage   of frequent words")
    print("                                                     p50       p99            p50       p99")
    for passages in args.passages:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            corpus = Path(name) / "corpus.jsonl"
            write_corpus(corpus, passages)
            asked = queries(corpus, args.queries)
            expected = estimate(corpus)
            ours = measure("ours", build, search, corpus, asked)
            print(line(passages, ours))
            print(f"{'':10} estimate: {expected}; {expected.seconds:.0f} s")
            if passages <= args.baseline:
                theirs = measure("bm25s", build_bm25s, search_bm25s, corpus, asked)
                print(line(passages, theirs))
                faster = [theirs["times"][kind][0] / ours["times"][kind][0] for kind in asked]
                worst = max(
                    abs(a - b) / b
                    for kind in asked
                    for some, other in zip(ours["scores"][kind], theirs["scores"][kind], strict=True)
                    for a, b in zip(some, other, strict=False)
                )
                print(f"{'':10} bm25s / ours: build {theirs['seconds'] / ours['seconds']:.1f}, p50 ", end="")
                print(", ".join(f"{x:.1f}" for x in faster), f"; largest difference of a score {worst:.1e}", sep="")
    print(line(WIKI, ours, WIKI / passages), " if all grows as the number of passages", sep="")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
