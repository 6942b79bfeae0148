"""What a line of a corpus may be: whatever passes can be sent, and ids differ."""

import json
from pathlib import Path

import pytest
from corpora import write_corpus
from fastapi.testclient import TestClient
from verl.utils.siop.retriever.bm25 import Bm25Index
from verl.utils.siop.retriever.corpus import MAX_DEPTH, CorpusError, parse_line
from verl.utils.siop.retriever.documents import Documents
from verl.utils.siop.retriever.server import create_app


def nested(levels: int, contents: str = "river") -> bytes:
    return b'{"id": "1", "contents": "%s", "more": %s1%s}' % (
        contents.encode(),
        b'{"a": [' * (levels // 2),
        b"]}" * (levels // 2),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"id": "2", "contents": "beta \xed\xa0\x80 river"}',
            r"line 7: not UTF-8 \(invalid continuation byte at byte 31",
        ),
        (b'{"id": "2", "contents": "beta \xff river"}', r"line 7: not UTF-8 \(invalid start byte at byte 31"),
        (
            nested(300),
            "line 7: 'more' has more than 32 lists and objects within each other, which no answer could hold",
        ),
        (nested(MAX_DEPTH + 2), "line 7: 'more' has more than 32"),
        (nested(200_000), r"line 7: not valid JSON \(maximum recursion"),
    ],
)
def test_a_passage_that_no_answer_can_hold_is_refused(line: bytes, message: str) -> None:
    with pytest.raises(CorpusError, match=f"^{message}"):
        parse_line(line, "line 7")


def test_what_passes_is_answered(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    lines = [
        nested(MAX_DEPTH),
        b'\xef\xbb\xbf{"id": 2, "contents": "river \xf0\x9f\x98\x80", "score": NaN, "n": 1e999}',
    ]
    corpus.write_bytes(b"\n".join(reversed(lines)) + b"\n")
    index = Bm25Index.build(corpus, tmp_path / "index", show_progress=False)
    with TestClient(create_app(index), raise_server_exceptions=False) as client:
        answer = client.post("/retrieve", json={"queries": ["river"]})
    (found,) = answer.json()["result"]
    assert answer.status_code == 200 and {document["id"] for document in found} == {"1", 2}


def test_titles_and_ids_are_refused_where_an_id_is_there_twice(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", ["a", "b", "c"])
    corpus.write_text(corpus.read_text() + "\n" + json.dumps({"id": "p1", "contents": "d"}))
    with pytest.raises(CorpusError, match=r"c\.jsonl, lines 2 and 5: the id 'p1' is there twice; ids must differ"):
        Documents.open(corpus, tmp_path / "titles", show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
