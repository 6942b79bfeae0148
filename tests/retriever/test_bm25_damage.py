"""Indexes that are damaged, of another corpus, version or kind: refused or built again, in one line."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dense_world
import pytest
from bm25_cases import files_of, found, random_passages
from corpora import write_corpus
from verl.utils.siop.retriever import bm25
from verl.utils.siop.retriever.bm25 import Bm25Index
from verl.utils.siop.retriever.bm25_merge import ARRAYS
from verl.utils.siop.retriever.bm25_postings import Postings
from verl.utils.siop.retriever.corpus import CorpusError
from verl.utils.siop.retriever.folder import identify, read_manifest

PASSAGES = random_passages(300)


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, Path]:
    """A corpus and its index."""
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    Bm25Index.build(corpus, tmp_path / "index", show_progress=False)
    return corpus, tmp_path / "index"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        dense_world.edit_manifest(path.parent, lambda fields: fields.update(changes))

    return edit


FAULTS = [(f"{name}.npy", fault) for name in ARRAYS for fault in (cut, change_a_byte, Path.unlink)]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *FAULTS,
        ("manifest.json", cut),
        ("manifest.json", edit_manifest(format=3)),
        ("manifest.json", edit_manifest(self_test=[300])),
        ("manifest.json", edit_manifest(files={})),
        ("manifest.json", edit_manifest(settings={"k1": 0.9, "b": 0.4})),
    ],
)
def test_damage_is_named_and_mended(
    built: tuple[Path, Path], caplog: pytest.LogCaptureFixture, name: str, fault: Callable[[Path], None]
) -> None:
    corpus, index = built
    good = files_of(index)
    fault(index / name)
    with pytest.raises(CorpusError) as caught:
        Bm25Index.load(index)
    message = str(caught.value)
    assert "\n" not in message and str(index) in message
    assert name in message or "self-test" in message or "of another version" in message
    caplog.set_level(logging.INFO)
    assert found(Bm25Index.open(corpus, index, show_progress=False), PASSAGES[5], 1) == ["p5"]
    assert f"indexing {corpus} into {index} again: {message}" in caplog.messages
    assert files_of(index) == good
    Bm25Index.load(index)


def test_index_is_reused_until_the_corpus_changes(built: tuple[Path, Path]) -> None:
    corpus, index = built
    manifest = (index / "manifest.json").stat().st_mtime_ns
    Bm25Index.open(corpus, index, show_progress=False)
    assert (index / "manifest.json").stat().st_mtime_ns == manifest
    write_corpus(corpus, [*PASSAGES[:4], "A zebra."])
    with pytest.raises(CorpusError, match=r"c\.jsonl has changed since the index in .* was built"):
        Bm25Index.load(index)
    changed = Bm25Index.open(corpus, index, show_progress=False)
    assert found(changed, "zebra", 3) == ["p4"] and len(changed) == 5
    assert sorted(path.name for path in corpus.parent.iterdir()) == ["c.jsonl", "index"]
    corpus.unlink()
    with pytest.raises(CorpusError, match=r"needs .*c\.jsonl, which is not there"):
        Bm25Index.load(index)


def test_another_corpus_of_equal_size_and_time_is_noticed(tmp_path: Path) -> None:
    corpus, index = write_corpus(tmp_path / "c.jsonl", [f"fact{i:04d}" for i in range(100)]), tmp_path / "index"
    Bm25Index.build(corpus, index, show_progress=False)
    stat = corpus.stat()
    corpus.write_text("".join(reversed(corpus.read_text().splitlines(keepends=True))))
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CorpusError, match="another corpus"):
        Bm25Index.load(index)
    (((document, _),),) = Bm25Index.open(corpus, index, show_progress=False).search(["fact0001"], 1)
    assert document["contents"] == "fact0001"


def test_a_corpus_may_move(built: tuple[Path, Path]) -> None:
    corpus, index = built
    manifest = (index / "manifest.json").stat().st_mtime_ns
    moved = corpus.rename(corpus.with_name("moved.jsonl"))
    with pytest.raises(CorpusError, match=r"needs .*c\.jsonl, which is not there"):
        Bm25Index.load(index)
    for opened in (Bm25Index.load(index, moved), Bm25Index.open(moved, index, show_progress=False)):
        assert found(opened, PASSAGES[5], 1) == ["p5"]
    assert (index / "manifest.json").stat().st_mtime_ns == manifest


def test_an_index_of_format_1_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus, index = write_corpus(tmp_path / "c.jsonl", PASSAGES), tmp_path / "index"
    index.mkdir()
    (index / "siop_index.json").write_text(json.dumps({"format": 1, "corpus": str(corpus), "documents": 300}))
    (index / "data.csc.index.npy").write_bytes(b"old")
    with pytest.raises(CorpusError, match="index of format 1"):
        Bm25Index.load(index)
    caplog.set_level(logging.INFO)
    Bm25Index.open(corpus, index, show_progress=False)
    assert "again" in caplog.text and "format 1" in caplog.text
    assert sorted(path.name for path in index.iterdir()) == sorted(["manifest.json", *(f"{n}.npy" for n in ARRAYS)])


def test_an_index_of_another_kind_is_left_alone(built: tuple[Path, Path]) -> None:
    corpus, index = built
    files = {name: {"bytes": 1, "sha256": ""} for name in ("offsets.npy", "probes.npy", "vectors/00000.f16.npy")}
    edit_manifest(kind="flat", settings={"shard_rows": 300}, files=files)(index / "manifest.json")
    before = (index / "manifest.json").read_bytes()
    for use in (Bm25Index.open, Bm25Index.build):
        with pytest.raises(CorpusError, match="holds an index of kind flat, not bm25; choose another folder"):
            use(corpus, index, show_progress=False)
    with pytest.raises(CorpusError, match="of kind flat"):
        Bm25Index.load(index)
    assert (index / "manifest.json").read_bytes() == before
    assert not index.with_name("index.parts").exists()


def test_the_self_test_finds_what_digests_cannot(built: tuple[Path, Path]) -> None:
    _, index = built
    manifest = read_manifest(index)
    assert len(manifest.self_test) == 20 and manifest.self_test[-1] > 250
    # The offsets of another corpus with their right digest, as a fault in building would leave them.
    content = bytearray((index / "offsets.npy").read_bytes())
    content[-2400:] = content[-1200:] + content[-2400:-1200]
    (index / "offsets.npy").write_bytes(content)
    files = {name: identity.model_dump() for name, identity in manifest.files.items()}
    files["offsets.npy"] = identify(index / "offsets.npy").model_dump()
    edit_manifest(files=files)(index / "manifest.json")
    with pytest.raises(CorpusError, match=r"self-test: .* does not find passage \d+ of .* by its own text"):
        Bm25Index.load(index)


def test_a_build_that_does_not_find_its_passages_fails(
    built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, index = built
    good = (index / "manifest.json").read_bytes()
    top = Postings.top
    monkeypatch.setattr(Postings, "top", lambda *args: [((i + 1) % 300, s) for i, s in top(*args)])
    with pytest.raises(CorpusError, match="self-test: of 40 passages only 0 are found by their own text"):
        Bm25Index.build(corpus, index, show_progress=False)
    assert (index / "manifest.json").read_bytes() == good


def test_passages_of_equal_text_and_without_words_pass_the_self_test(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", ["same text", "?!", "", "same text"] * 30)
    index = Bm25Index.build(corpus, tmp_path / "index", show_progress=False)
    assert found(index, "same", 3) == ["p0", "p3", "p4"]
    assert len(Bm25Index.load(tmp_path / "index")) == 120


def test_another_version_of_unicode_is_said(
    built: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bm25, "UNICODE", "99.0.0")
    Bm25Index.load(built[1])
    assert "this Python has 99.0.0" in caplog.text
