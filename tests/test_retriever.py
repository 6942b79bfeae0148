"""The BM25 index and the retriever service, as a real process over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from verl.utils.siop.retriever.bm25 import Bm25Index, CorpusError
from verl.utils.siop.retriever.server import main

PASSAGES = [
    "The founder of Kovaco Tozex is Nila Bodson.",
    "The chief of Kovaco Tozex is Maro Tinson.",
    "Nila Bodson was born in Peruo Betville.",
    "Nila Bodson lives in Fevo Fudiville.",
    "The twin of Peruo Betville is Fevo Fudiville.",
]


def write_corpus(path: Path, passages: list[str]) -> Path:
    lines = [json.dumps({"id": f"p{i}", "contents": text}) for i, text in enumerate(passages)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def found(index: Bm25Index, query: str, k: int) -> list[str]:
    return [document["id"] for document, _ in index.search([query], k)[0]]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "verl.utils.siop.retriever.server", *args]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("retriever")
    corpus = write_corpus(folder / "corpus.jsonl", PASSAGES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command("--corpus", str(corpus), "--port", str(port)), stderr=log, stdout=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            try:
                httpx.get(url + "/health").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.2)
        assert f"serving {len(PASSAGES)} documents" in (folder / "log").read_text()
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def test_search_ranks_by_shared_words_and_returns_only_matches(tmp_path: Path) -> None:
    index = Bm25Index.build(write_corpus(tmp_path / "c.jsonl", PASSAGES), tmp_path / "index", show_progress=False)
    assert len(index) == len(PASSAGES)
    assert found(index, "FOUNDER kovaco tozex", 3) == ["p0", "p1"]
    assert found(index, "born nila bodson", 1) == ["p2"]
    assert found(index, "zebra", 3) == [] and found(index, "", 3) == [] and found(index, "?!", 3) == []
    # Stop words are ignored beside other words, and used when there is nothing else.
    assert found(index, "the zebra", 3) == []
    assert len(found(index, "the", 5)) == 3


def test_equal_scores_come_in_corpus_order(tmp_path: Path) -> None:
    index = Bm25Index.from_documents([{"id": i, "contents": f"same words {i}"} for i in range(50)])
    assert [d["id"] for d, _ in index.search(["same words"], 7)[0]] == list(range(7))
    scores = [score for _, score in index.search(["same words 31"], 3)[0]]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[1]


def test_documents_keep_their_other_keys_and_text_in_any_script(tmp_path: Path) -> None:
    documents = [{"id": 7, "contents": "Größe 大きさ\n\nline", "title": "x"}, {"id": "b", "contents": ""}]
    path = tmp_path / "c.jsonl"
    path.write_text("\n\n".join(json.dumps(d, ensure_ascii=False) for d in documents), encoding="utf-8")
    index = Bm25Index.build(path, tmp_path / "i", show_progress=False)
    assert index.search(["größe"], 5)[0][0][0] == documents[0]


def test_index_is_reused_until_the_corpus_changes(tmp_path: Path) -> None:
    corpus, folder = write_corpus(tmp_path / "c.jsonl", PASSAGES), tmp_path / "index"
    Bm25Index.open(corpus, folder, show_progress=False)
    built = (folder / "data.csc.index.npy").stat().st_mtime_ns
    assert found(Bm25Index.open(corpus, folder, show_progress=False), "twin", 3) == ["p4"]
    assert (folder / "data.csc.index.npy").stat().st_mtime_ns == built
    write_corpus(corpus, [*PASSAGES[:4], "A zebra."])
    os.utime(corpus, ns=(1, 1))
    with pytest.raises(CorpusError, match="has changed"):
        Bm25Index.load(folder)
    changed = Bm25Index.open(corpus, folder, show_progress=False)
    assert found(changed, "twin", 3) == [] and found(changed, "zebra", 3) == ["p4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "index"]


def test_index_never_replaces_a_foreign_folder(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CorpusError, match="mine is not empty"):
        Bm25Index.open(corpus, tmp_path / "mine", show_progress=False)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"id": 1, "contents": "a"}\n{"id": 2, "contents"', "line 2: not valid JSON"),
        ('{"id": 1, "contents": "a"}\n\n["b"]', "line 3: expected an object"),
        ('{"id": 1, "text": "a"}', "line 1: 'contents' must be a string, got None"),
        ('{"contents": "a"}', "line 1: 'id' must be"),
    ],
)
def test_bad_corpus_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(text)
    with pytest.raises(CorpusError, match=message) as caught:
        Bm25Index.open(path, tmp_path / "index", show_progress=False)
    assert "c.jsonl" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_wire_format(service: str) -> None:
    body = {"queries": ["founder kovaco tozex", "zebra"], "topk": 3, "return_scores": True}
    (first, second) = httpx.post(service + "/retrieve", json=body).json()["result"]
    assert [hit["document"] for hit in first] == [{"id": f"p{i}", "contents": PASSAGES[i]} for i in (0, 1)]
    assert first[0]["score"] > first[1]["score"] > 0 and second == []
    body = {"queries": ["founder kovaco tozex"], "topk": 1}
    assert httpx.post(service + "/retrieve", json=body).json() == {"result": [[{"id": "p0", "contents": PASSAGES[0]}]]}
    # Without topk, the server's own default of 3.
    assert len(httpx.post(service + "/retrieve", json={"queries": ["kovaco nila peruo"]}).json()["result"][0]) == 3
    assert httpx.get(service + "/health").json() == {"status": "healthy", "documents": len(PASSAGES)}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "queries"),
        ({"queries": []}, "queries"),
        ({"queries": "founder"}, "queries"),
        ({"queries": ["a", 3]}, "queries"),
        ({"queries": ["a" * 5000]}, "queries"),
        ({"queries": ["a"] * 600}, "queries"),
        ({"queries": ["a"], "topk": 0}, "topk"),
        ({"queries": ["a"], "topk": 101}, "topk"),
        ({"queries": ["a"], "topk": "3"}, "topk"),
        ({"queries": ["a"], "return_scores": "no"}, "return_scores"),
        ({"queries": ["a"], "top_k": 3}, "top_k"),
    ],
)
def test_bad_request_gets_422_with_the_field(service: str, body: dict, field: str) -> None:
    response = httpx.post(service + "/retrieve", json=body)
    assert response.status_code == 422
    assert field in {part for error in response.json()["detail"] for part in error["loc"]}


def test_server_with_a_busy_port_fails_with_one_line(service: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    args = command("--corpus", str(corpus), "--port", service.rsplit(":", 1)[1])
    result = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot listen on 127.0.0.1:")
    assert "Address already in use" in result.stderr and len(result.stderr.splitlines()) == 1


def test_server_with_a_bad_corpus_or_argument_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, message in (("none.jsonl", "No such file"), ("empty.jsonl", "is empty"), (".", "is not a file")):
        assert main(["--corpus", str(tmp_path / name), "--port", "0"]) == 1
        assert f"{message}" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit) as caught:
        main(["--corpus", "c.jsonl", "--port", "70000"])
    assert caught.value.code == 2 and "a port is a number" in capsys.readouterr().err
