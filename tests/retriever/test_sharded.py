"""Parts of an index behind retrievers of their own."""

import contextlib
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
from hypothesis import given
from hypothesis import strategies as st
from scorer_process import free_port
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.retriever.index import Hits
from verl.utils.siop.retriever.server import main
from verl.utils.siop.retriever.sharded import ShardedIndex, ShardUnavailable, merge


@given(
    scores=st.lists(st.integers(0, 5), min_size=1, max_size=30), cuts=st.lists(st.integers(0, 30)), k=st.integers(1, 9)
)
def test_merging_parts_is_searching_the_whole(scores: list[int], cuts: list[int], k: int) -> None:
    def best(numbers: Sequence[int]) -> Hits:
        return [({"id": i}, float(scores[i])) for i in sorted(numbers, key=lambda i: -scores[i])[:k]]

    edges = [0, *sorted(min(cut, len(scores)) for cut in cuts), len(scores)]
    parts = [best(range(start, end)) for start, end in itertools.pairwise(edges)]
    assert merge(parts, k) == best(range(len(scores)))


class Shard:
    """A retriever over documents with the given scores, whatever the query; ``answer`` replaces its answers."""

    def __init__(self, scores: dict[str, float], **health: Any) -> None:
        self.scores, self.health = scores, {"kind": "flat", "encoder": "e", "documents": len(scores), **health}
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
        index = ShardedIndex(urls)
        assert len(index) == 30 and index.health["kind"] == "sharded"
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
    shards = Shard({"a": 1.0}), Shard({"b": 1.0}, encoder="other"), Shard({"c": 1.0}, kind="bm25")
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
            assert health["documents"] == 2 and health["kind"] == "sharded" and list(health["shards"]) == urls
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
