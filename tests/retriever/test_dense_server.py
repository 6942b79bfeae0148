"""The service over a dense index: batches, memory, counters, and real HTTP."""

import contextlib
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from corpora import write_corpus
from dense_world import command, passages, save_encoder
from fastapi.testclient import TestClient
from verl.utils.siop.retriever import dense, server
from verl.utils.siop.retriever.batching import BatchedIndex
from verl.utils.siop.retriever.index import Hits, SearchFailed
from verl.utils.siop.retriever.metrics import Metrics


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    corpus = write_corpus(folder / "c.jsonl", passages(200))
    prefixes = ("--query-prefix", "query: ", "--passage-prefix", "passage: ")
    command("encode", "--corpus", corpus, "--model", save_encoder(folder / "encoder"), *prefixes)
    command("index", folder / "c.jsonl.flat", "--kind", "hnsw_sq8", "--index", folder / "hnsw")
    return folder / "c.jsonl.flat"


class Recorded:
    """Notes each batch; the first waits until it may go on, so that more queries wait behind it."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], int]] = []
        self.go_on = threading.Event()

    def __len__(self) -> int:
        return 1

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        self.batches.append((list(queries), k))
        assert self.go_on.wait(60)
        if "bad" in queries:
            raise RuntimeError("the device is gone")
        return [[({"id": f"{query} {i}"}, float(-i)) for i in range(k)] for query in queries]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"siop_retriever_{name}", labels)


def held(index: Recorded, batched: BatchedIndex, metrics: Metrics, asked: Sequence[tuple[str, int]]) -> list[Any]:
    """Results, or errors, of queries that wait together behind a first one."""

    def ask(query: str, k: int) -> Any:
        try:
            return batched.search([query], k)[0]
        except SearchFailed as error:
            return error

    index.go_on.clear()
    with ThreadPoolExecutor(100) as threads:
        before = len(index.batches)
        first = threads.submit(ask, f"first {before}", 1)
        wait_for(lambda: len(index.batches) > before)
        waiting = [threads.submit(ask, *one) for one in asked]
        wait_for(lambda: value(metrics, "queue") == len(asked))
        index.go_on.set()
        assert len(first.result(60)) == 1
        return [future.result(60) for future in waiting]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_waits_is_searched_together_and_split() -> None:
    index, metrics = Recorded(), Metrics()
    batched = BatchedIndex([index], metrics=metrics, cache_mb=0)
    asked = [(f"q{i % 70}", 1 + i % 3) for i in range(90)]
    results = held(index, batched, metrics, asked)
    assert results == [[({"id": f"{query} {i}"}, float(-i)) for i in range(k)] for query, k in asked]
    sizes = [len(queries) for queries, _ in index.batches]
    assert sizes[0] == 1 and len(sizes) == 3 and max(sizes) <= 64
    assert all(len(set(queries)) == len(queries) for queries, _ in index.batches)
    assert value(metrics, "batch_size_count") == 3 and value(metrics, "batch_size_sum") == sum(sizes)
    assert value(metrics, "queue") == 0 and value(metrics, "queries_total") == 91
    batched.close()


def test_a_query_that_fails_does_so_alone_and_with_the_cause() -> None:
    index, metrics = Recorded(), Metrics()
    batched = BatchedIndex([index], metrics=metrics)
    results = held(index, batched, metrics, [("bad", 1), ("good", 1), ("bad", 2), ("fine", 2)])
    assert [str(error) for error in results[::2]] == ["the search failed: RuntimeError: the device is gone"] * 2
    assert results[1::2] == [[({"id": "good 0"}, 0.0)], [({"id": "fine 0"}, 0.0), ({"id": "fine 1"}, -1.0)]]
    assert batched.search(["good"], 2) == [[({"id": "good 0"}, 0.0), ({"id": "good 1"}, -1.0)]]
    batched.close()
    with pytest.raises(SearchFailed, match="the index is closed"):
        batched.search(["good"], 3)


def test_each_device_has_its_thread() -> None:
    indexes = [Recorded(), Recorded()]
    batched = BatchedIndex(indexes)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(batched.search, ["a"], 1)]
        wait_for(lambda: any(index.batches for index in indexes))
        # (Not before: one thread would take both as one batch.)
        waiting.append(threads.submit(batched.search, ["b"], 1))
        wait_for(lambda: all(index.batches for index in indexes))
        for index in indexes:
            index.go_on.set()
        assert sorted(future.result(60)[0][0][0]["id"] for future in waiting) == ["a 0", "b 0"]
    batched.close()


def test_hits_are_remembered_up_to_a_size() -> None:
    index, metrics = Recorded(), Metrics()
    index.go_on.set()
    batched = BatchedIndex([index], metrics=metrics, cache_mb=0.01)
    first = batched.search(["a", "b", "a"], 1)
    assert first[0] == first[2] and len(index.batches) <= 2
    searches = len(index.batches)
    assert batched.search(["b", "a"], 1) == [first[1], first[0]] and len(index.batches) == searches
    assert value(metrics, "cache_hits_total") == 2
    assert len(batched.search(["a"], 2)[0]) == 2 and len(index.batches) == searches + 1  # another k
    for i in range(100):
        batched.search([f"c{i}"], 1)
    searches = len(index.batches)
    batched.search(["a"], 1)
    assert len(index.batches) == searches + 1  # it has left
    batched.search(["large" * 99], 100)  # more than all of the memory
    batched.search(["large" * 99], 100)
    assert len(index.batches) == searches + 3
    batched.close()


def test_the_memory_is_what_its_limit_says() -> None:
    """Of hits whose bulk is in lists, of small numbers, or in the query."""

    class Bulky(Recorded):
        def search(self, queries: Sequence[str], k: int) -> list[Hits]:
            self.batches.append((list(queries), k))
            return [
                [({"id": q[:9], "parts": [q[:9] * 900 for _ in range(3)], "n": [*range(999)]}, 0.5)] for q in queries
            ]

    index = Bulky()
    batched = BatchedIndex([index], cache_mb=1)
    ask = [f"{i:09d}" + "\U0001f600" * 4000 for i in range(400)]
    tracemalloc.start()
    first = [batched.search([query], 1) for query in ask[:1]]
    before = tracemalloc.get_traced_memory()[0]
    for query in ask:
        batched.search([query], 1)
    index.batches.clear()
    gc.collect()
    assert tracemalloc.get_traced_memory()[0] - before < 1.3 * 2**20
    tracemalloc.stop()
    assert batched.search(ask[-1:], 1) == [
        [({**first[0][0][0][0], "id": ask[-1][:9], "parts": [ask[-1][:9] * 900] * 3}, 0.5)]
    ]
    assert not index.batches  # from memory
    batched.close()


def test_many_at_once_get_what_one_at_a_time_gets(flat: Path) -> None:
    metrics = Metrics()
    (index,) = dense.load(flat, metrics=metrics, show_progress=False)
    batched = BatchedIndex([index], metrics=metrics)
    queries = [f"town founded by {text[-9:]}" for text in passages(60)]
    alone = [index.search([query], 5)[0] for query in queries]
    with ThreadPoolExecutor(30) as threads:
        together = list(threads.map(lambda query: batched.search([query], 5)[0], queries))
    for one, other in zip(alone, together, strict=True):
        # What else is in a batch changes the last digits of a score.
        assert [score for _, score in one] == pytest.approx([score for _, score in other], abs=1e-5)
        assert {document["id"] for document, _ in one} == {document["id"] for document, _ in other}
    searches = value(metrics, "search_seconds_count")
    assert searches and searches < 120 and searches == value(metrics, "encode_seconds_count")
    batched.close()


def test_a_failing_encoder_is_an_answer_with_the_cause(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index,) = dense.load(flat, show_progress=False)
    batched = BatchedIndex([index])
    with TestClient(server.create_app(batched)) as client:
        assert client.post("/retrieve", json={"queries": ["a"]}).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(index.encoder._model, "encode", _fail)
            failed = client.post("/retrieve", json={"queries": ["b"]})
        assert failed.status_code == 500
        assert failed.json() == {"detail": "the search failed: RuntimeError: CUDA error: out of memory"}
        assert client.post("/retrieve", json={"queries": ["b"]}).status_code == 200
        counts = client.get("/metrics").text
        assert 'siop_retriever_requests_total{status="500"} 1.0' in counts
        assert 'siop_retriever_requests_total{status="200"} 2.0' in counts
    batched.close()


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("CUDA error: out of memory")


@contextlib.contextmanager
def running(folder: Path, *arguments: object) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "verl.utils.siop.retriever.server", *map(str, arguments), "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stderr=log, stdout=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url + "/health").raise_for_status()
                break
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.mark.parametrize("kind", ["flat", "hnsw_sq8"])
def test_a_dense_folder_over_http(flat: Path, tmp_path: Path, kind: str) -> None:
    folder = flat if kind == "flat" else flat.with_name("hnsw")
    (index,) = dense.load(folder, show_progress=False)
    with running(tmp_path, "--index", folder, "--topk", 4) as url:
        health = httpx.get(url + "/health").json()
        manifest = json.loads((folder / "manifest.json").read_text())
        assert health == {
            "status": "healthy",
            "documents": 200,
            "topk": 4,
            "kind": kind,
            "corpus_sha256": manifest["corpus"]["sha256"],
            "encoder": manifest["settings"]["encoder"],
            "recall": "exact" if kind == "flat" else manifest["measured"]["recall"],
        }
        body: dict[str, Any] = {"queries": ["founded by olaF 13", "", "the Amo"], "return_scores": True}
        results = httpx.post(url + "/retrieve", json=body).json()["result"]
        for hits, expected in zip(results, index.search(body["queries"], 4), strict=True):
            assert [hit["document"]["id"] for hit in hits] == [document["id"] for document, _ in expected]
            assert [hit["score"] for hit in hits] == pytest.approx([score for _, score in expected], abs=1e-5)
        assert httpx.post(url + "/retrieve", json={"queries": ["a"], "topk": 101}).status_code == 422
        httpx.post(url + "/retrieve", json=body)
        counts = httpx.get(url + "/metrics").text
        assert re.search(r"^siop_retriever_cache_hits_total 3\.0$", counts, re.M)
        assert re.search(r'^siop_retriever_requests_total\{status="422"\} 1\.0$', counts, re.M)
        assert re.search(r"^siop_retriever_queue 0\.0$", counts, re.M)
        assert "siop_retriever_encode_seconds_bucket" in counts and "siop_retriever_search_seconds_sum" in counts


def test_a_start_that_cannot_be_is_one_line(flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: object) -> str:
        assert server.main([*map(str, arguments), "--port", "0"]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "holds no index (manifest.json is missing)" in error("--index", tmp_path)
    assert "--devices cuda:9: this machine has" in error("--index", flat, "--devices", "cuda:9")
    assert f"needs {tmp_path / 'no.jsonl'}, which is not there" in error(
        "--index", flat, "--corpus", tmp_path / "no.jsonl"
    )
    assert "cannot load the encoder" in error("--index", flat, "--model", tmp_path / "none")
    corpus = write_corpus(tmp_path / "c.jsonl", passages(3))
    assert "c.jsonl.bm25 holds no index" in error("--corpus", corpus, "--model", "x")
    server.Bm25Index.build(corpus, tmp_path / "c.jsonl.bm25", show_progress=False)
    assert error("--corpus", corpus, "--model", "x").endswith("c.jsonl.bm25 is an index of BM25")
    with pytest.raises(SystemExit):
        server.main([])
    assert "there is nothing to search: give --index" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: data.replace(b'"bm25"', b'"flat"')])
def test_a_damaged_manifest_of_bm25_is_built_again(tmp_path: Path, damage: Any) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages(20))
    folder = tmp_path / "c.jsonl.bm25"
    server.Bm25Index.build(corpus, folder, show_progress=False)
    path = folder / "manifest.json"
    path.write_bytes(damage(path.read_bytes()))
    if b"flat" in path.read_bytes():  # it says that it is another kind's, which is not replaced
        assert server.main(["--corpus", str(corpus), "--port", "0"]) == 1
        return
    with running(tmp_path, "--corpus", corpus) as url:
        assert httpx.get(url + "/health").json()["kind"] == "bm25"
    assert f"into {folder} again: {path} is damaged" in (tmp_path / "log").read_text()


def test_bm25_is_served_from_its_folder_alone(tmp_path: Path) -> None:
    from verl.utils.siop.retriever.bm25 import Bm25Index

    corpus = write_corpus(tmp_path / "c.jsonl", passages(20))
    Bm25Index.build(corpus, tmp_path / "bm25", show_progress=False)
    with running(tmp_path, "--index", tmp_path / "bm25") as url:
        assert httpx.get(url + "/health").json()["kind"] == "bm25"
        assert httpx.post(url + "/retrieve", json={"queries": ["town amo"]}).json()["result"][0]
