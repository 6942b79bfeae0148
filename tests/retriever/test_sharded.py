"""Parts of an index behind retrievers of their own."""

import contextlib
import hashlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from scorer_process import free_port
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.retriever.bm25 import Bm25Index
from verl.utils.siop.retriever.index import Hits
from verl.utils.siop.retriever.server import create_app, main
from verl.utils.siop.retriever.sharded import (
    INDEX_HEADER,
    ShardChanged,
    ShardedIndex,
    ShardUnavailable,
    index_id,
    merge,
)


@given(
    scores=st.lists(st.integers(0, 5), min_size=1, max_size=30), cuts=st.lists(st.integers(0, 30)), k=st.integers(1, 9)
)
def test_merging_parts_is_searching_the_whole(scores: list[int], cuts: list[int], k: int) -> None:
    def best(numbers: Sequence[int]) -> Hits:
        return [({"id": i}, float(scores[i])) for i in sorted(numbers, key=lambda i: -scores[i])[:k]]

    edges = [0, *sorted(min(cut, len(scores)) for cut in cuts), len(scores)]
    parts = [best(range(start, end)) for start, end in itertools.pairwise(edges)]
    assert merge(parts, k) == best(range(len(scores)))


ENCODER: dict[str, Any] = {
    "model": "/models/e5", "revision": None, "weights_sha256": "0" * 64, "dimension": 8, "pooling": "mean",
    "query_prompt": "query: ", "passage_prompt": "passage: ", "max_query_tokens": 256, "max_passage_tokens": 256,
    "dtype": "float16",
}  # fmt: skip


class Shard:
    """A retriever over documents with the given scores, whatever the query; ``answer`` replaces its answers."""

    def __init__(self, scores: dict[str, float], **health: Any) -> None:
        corpus = hashlib.sha256("".join(scores).encode()).hexdigest()
        self.scores = scores
        self.health = {"kind": "flat", "encoder": ENCODER, "documents": len(scores), "corpus_sha256": corpus, **health}
        self.failures = 0
        self.answer: Any = None

    def retrieve(self, body: dict[str, Any]) -> Any:
        best = sorted(self.scores.items(), key=lambda item: -item[1])
        hits = [{"document": {"id": i, "contents": i}, "score": score} for i, score in best]
        return {"result": [hits[: body["topk"]] for _ in body["queries"]]}


@contextmanager
def serving(*shards: Shard) -> Iterator[list[str]]:
    with ExitStack() as stack:
        urls = []
        for shard in shards:
            server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(shard))
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            Thread(target=server.serve_forever, daemon=True).start()
            urls.append(f"http://127.0.0.1:{server.server_port}")
        yield urls


def _handler(shard: Shard) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(shard.health)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if shard.failures:
                shard.failures -= 1
                self.send_error(503)
            else:
                self._send(shard.retrieve(body) if shard.answer is None else shard.answer)

        def _send(self, answer: Any) -> None:
            self.send_response(200)
            self.send_header(INDEX_HEADER, index_id(shard.health))
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def test_searches_all_parts() -> None:
    rng = np.random.default_rng(0)
    scores = {str(i): float(s) for i, s in enumerate(rng.random(30))}
    parts = [Shard({i: scores[i] for i in list(scores)[start : start + 10]}) for start in (0, 10, 20)]
    with serving(*parts) as urls:
        # As RETRIEVER_URL has it, too.
        index = ShardedIndex([urls[0], f"{urls[1]}/retrieve", f"{urls[2]}/"])
        assert len(index) == 30 and index.facts()["kind"] == "sharded"
        expected = sorted(scores, key=lambda i: -scores[i])[:12]
        assert [[hit[0]["id"] for hit in hits] for hits in index.search(["a", "b"], 12)] == [expected] * 2
        assert [hit[1] for hit in index.search(["a"], 2)[0]] == [scores[i] for i in expected[:2]]


def test_a_part_that_fails_once_is_asked_again_and_one_that_stays_down_is_an_error() -> None:
    one, two = Shard({"a": 1.0}), Shard({"b": 2.0})
    with serving(one, two) as urls:
        index = ShardedIndex(urls)
        two.failures = 1
        assert [hit[0]["id"] for hit in index.search(["x"], 5)[0]] == ["b", "a"]
        two.failures = 2
        with pytest.raises(ShardUnavailable, match=f"{urls[1]} after 2 attempt.*HTTP 503"):
            index.search(["x"], 5)
        wrong: list[Any] = [{"result": []}, {"result": [[{"document": {}}]]}, [], {"result": None}]
        for answer in wrong:
            two.answer = answer
            with pytest.raises(SiopError, match=urls[1]):
                index.search(["x"], 5)


def test_parts_whose_scores_cannot_be_compared_are_refused() -> None:
    shards = Shard({"a": 1.0}), Shard({"b": 1.0}, encoder=ENCODER | {"pooling": "cls"}), Shard({"c": 1.0}, kind="bm25")
    with serving(*shards) as (flat, other, bm25):
        with pytest.raises(SiopConfigError, match=f"{other} and {flat} have different encoders"):
            ShardedIndex([flat, other])
        with pytest.raises(SiopConfigError, match=f"{bm25} has BM25"):
            ShardedIndex([flat, bm25])
        with pytest.raises(SiopConfigError, match="different addresses"):
            ShardedIndex([flat, f"{flat}/"])
        shards[1].health = {"status": "ok"}
        with pytest.raises(SiopConfigError, match="is no retriever"):
            ShardedIndex([flat, other])
    with pytest.raises(SiopConfigError, match="got none"):
        ShardedIndex([])
    with pytest.raises(ShardUnavailable):
        ShardedIndex([f"http://127.0.0.1:{free_port()}"])


def test_parts_say_which_corpus_and_encoder_they_have() -> None:
    one, two = Shard({"a": 1.0}), Shard({"b": 1.0})
    with serving(one, two) as urls:
        wrongs: list[dict[str, Any]] = [
            {"corpus_sha256": None}, {"encoder": None}, {"encoder": "e5"}, {"documents": -5}, {"documents": 0},
            {"documents": True}, {"documents": "3"}, {"shards": [{}]},
        ]  # fmt: skip
        for wrong in wrongs:
            kept, two.health = two.health, two.health | wrong
            with pytest.raises(SiopConfigError, match=f"{urls[1]} is no retriever .*{next(iter(wrong))}"):
                ShardedIndex(urls)
            two.health = kept
        two.health["corpus_sha256"] = one.health["corpus_sha256"]
        with pytest.raises(SiopConfigError, match=f"{urls[1]} and {urls[0]} serve the same corpus: every hit would"):
            ShardedIndex(urls)


@pytest.mark.parametrize("field", ["weights_sha256", "dimension", "pooling", "query_prompt", "max_query_tokens"])
def test_encoders_compare_by_what_their_vectors_depend_on(field: str) -> None:
    elsewhere = ENCODER | {"model": "/disk/e5", "revision": "main", "dtype": "float32"}
    one, two = Shard({"a": 1.0}), Shard({"b": 2.0}, encoder=elsewhere)
    with serving(one, two) as urls:
        assert len(ShardedIndex(urls)) == 2
        two.health["encoder"] = elsewhere | {field: 9 if isinstance(ENCODER[field], int) else "other"}
        with pytest.raises(SiopConfigError, match="different encoders"):
            ShardedIndex(urls)


def router(*urls: str) -> Shard:
    """A retriever over parts, as a part of another one."""
    index = ShardedIndex(urls)
    return Shard({str(i): 1.0 for i in range(len(index))}, **index.facts())


def test_parts_that_have_parts_are_checked_too() -> None:
    a, b, c = Shard({"a": 1.0}), Shard({"b": 1.0}), Shard({"c": 1.0}, encoder=ENCODER | {"pooling": "cls"})
    with serving(a, b, c) as (url_a, url_b, url_c), serving(router(url_a), router(url_b), router(url_c)) as routers:
        assert len(ShardedIndex(routers[:2])) == 2
        with pytest.raises(SiopConfigError, match="different encoders"):
            ShardedIndex([routers[0], routers[2]])
        with pytest.raises(SiopConfigError, match="serve the same corpus"):
            ShardedIndex([routers[0], url_a])


def test_what_is_told_of_parts_does_not_depend_on_their_addresses() -> None:
    with serving(Shard({"a": 1.0}), Shard({"b": 1.0})) as urls, serving(Shard({"a": 1.0}), Shard({"b": 1.0})) as others:
        facts = ShardedIndex(urls).facts()
        assert facts == ShardedIndex(others).facts() != ShardedIndex(urls[::-1]).facts()
        assert facts["encoder"] == ENCODER and "http" not in json.dumps(facts)


def test_a_part_that_has_become_another_index_is_not_asked_on() -> None:
    one, two = Shard({"a": 1.0}), Shard({"b": 2.0})
    with serving(one, two) as urls:
        index = ShardedIndex(urls)
        with TestClient(create_app(index, facts=index.facts)) as client:
            assert client.get("/health").json()["documents"] == 2
            two.health = {"kind": "bm25", "documents": 1, "corpus_sha256": two.health["corpus_sha256"]}
            told = f"{urls[1]} has another index than when this service started"
            for answer in (client.get("/health"), client.post("/retrieve", json={"queries": ["x"]})):
                assert answer.status_code == 503 and told in answer.json()["detail"]
        with pytest.raises(ShardChanged, match=told):
            index.search(["x"], 3)


def test_answers_of_a_real_retriever_say_of_which_index_they_are() -> None:
    facts = {"kind": "flat", "corpus_sha256": "0", "encoder": ENCODER, "recall": {"10": 0.95}}
    with TestClient(create_app(Bm25Index.from_documents([{"id": 1, "contents": "a"}]), facts=facts)) as client:
        told = client.post("/retrieve", json={"queries": ["a"]}).headers[INDEX_HEADER]
        assert told == index_id(client.get("/health").json())


def test_the_server_over_parts_and_with_documents(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "contents": "Title\\nText."}\n')
    port = free_port()
    with serving(Shard({"a": 1.0}), Shard({"b": 2.0})) as urls:
        command = [sys.executable, "-m", "verl.utils.siop.retriever.server", "--shards", *urls, "--port", str(port)]
        process = subprocess.Popen([*command, "--corpus", str(corpus), "--read"], stderr=subprocess.PIPE, text=True)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(300):
                assert process.poll() is None
                with contextlib.suppress(httpx.TransportError):
                    health = httpx.get(f"{url}/health").json()
                    break
                time.sleep(0.2)
            assert health["documents"] == 2 and health["kind"] == "sharded"
            found = httpx.post(f"{url}/retrieve", json={"queries": ["x"], "topk": 1}).json()
            assert found == {"result": [[{"id": "b", "contents": "b"}]]}
            assert httpx.post(f"{url}/read", json={"title": "title"}).json()["result"]["text"] == "Text."
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "http://a", "--index", "x"], "have no effect with --shards"),
        (["--shards", "http://a", "--corpus", "x"], "--corpus has no effect with --shards"),
        (["--index", "x", "--read"], "--read needs --corpus"),
        ([], "give --index, --shards, or --corpus"),
    ],
)
def test_options_without_effect(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err
