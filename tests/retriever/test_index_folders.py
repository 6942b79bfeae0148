"""The folder of an index: what may be replaced, what is swept, and what a manifest may say."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bm25_cases import random_passages
from corpora import write_corpus
from verl.utils.siop.retriever import bm25, documents
from verl.utils.siop.retriever.bm25 import Bm25Index
from verl.utils.siop.retriever.corpus import CorpusError
from verl.utils.siop.retriever.documents import Documents
from verl.utils.siop.retriever.folder import (
    FILES,
    IndexFolderError,
    check_target,
    manifest_text,
    new_folder,
    read_manifest,
)
from verl.utils.siop.retriever.parts import NEW, OLD, locked_parts, parts_of, replace

PASSAGES = random_passages(60)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "c.jsonl", PASSAGES)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("manifest", ['{"hello": 1}', '{"kind": "bm25"}', "{cut", "[]"])
def test_a_folder_with_a_manifest_keeps_what_no_index_has(tmp_path: Path, manifest: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    corpus = write_corpus(folder / "c.jsonl", PASSAGES)
    (folder / "manifest.json").write_text(manifest)
    (folder / "train.parquet").write_bytes(b"rows")
    before = contents(folder)
    for build in (Bm25Index.open, Bm25Index.build, Documents.open):
        with pytest.raises(CorpusError, match=r"data holds .*; choose another folder") as caught:
            build(corpus, folder, show_progress=False)
        assert (
            "not of an index" in str(caught.value)
            or "c.jsonl, train.parquet" in str(caught.value)
            or ("kind bm25, not documents" in str(caught.value))
        )
        assert contents(folder) == before and not parts_of(folder).exists()


@pytest.mark.parametrize("kind", sorted(FILES))
def test_only_an_index_of_the_same_kind_is_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "index"
    target.mkdir()
    check_target(target, kind)
    (target / "manifest.json").write_text(manifest_text({"kind": kind}))
    with pytest.raises(CorpusError, match=f"no file of an index of kind {kind}"):
        check_target(target, kind)
    for name in FILES[kind]:
        (target / name).touch()
    check_target(target, kind)
    for other in set(FILES) - {kind}:
        with pytest.raises(
            CorpusError, match=f"index holds an index of kind {kind}, not {other}; choose another folder"
        ):
            check_target(target, other)
    (target / "notes.txt").touch()
    with pytest.raises(CorpusError, match=f"notes.txt, which no index of kind {kind} has"):
        check_target(target, kind)
    (target / "notes.txt").unlink()
    (target / "keys").mkdir()
    with pytest.raises(CorpusError, match=r"holds an index of kind .* and keys, which no index"):
        check_target(target, kind)


def test_titles_do_not_take_the_place_of_another_index(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c.jsonl.documents"
    Bm25Index.build(corpus, folder, show_progress=False)
    before = contents(folder)
    with pytest.raises(
        CorpusError, match="documents holds an index of kind bm25, not documents; choose another folder"
    ):
        Documents.open(corpus, folder, show_progress=False)
    assert contents(folder) == before


def test_an_index_of_format_1_is_replaced_with_its_own_files_alone(tmp_path: Path) -> None:
    target = tmp_path / "index"
    target.mkdir()
    for name in ("siop_index.json", "data.csc.index.npy", "vocab.index.json", "offsets.npy"):
        (target / name).touch()
    check_target(target, "bm25")
    with pytest.raises(CorpusError, match=r"holds an index of format 1, and data.csc.index.npy, "):
        check_target(target, "hnsw")
    (target / "c.jsonl").touch()
    with pytest.raises(CorpusError, match=r"holds an index of format 1, and c.jsonl, which no index of kind bm25 has"):
        check_target(target, "bm25")


def test_an_index_behind_a_link_is_replaced_there(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    Bm25Index.build(corpus, tmp_path / "disk" / "index", show_progress=False)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "index")
    write_corpus(corpus, PASSAGES[:20])
    assert len(Bm25Index.open(corpus, tmp_path / "link", show_progress=False)) == 20
    assert (tmp_path / "link").is_symlink() and read_manifest(tmp_path / "disk" / "index").corpus.documents == 20


def test_what_a_killed_build_left_is_swept_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "index"
    with locked_parts(target) as (parts, _):
        (parts / NEW).mkdir()
        (parts / NEW / "index.faiss").write_bytes(b"as large as the index")
    assert parts.is_dir()  # what is in it stays, as after a kill
    with locked_parts(target) as (parts, _), new_folder(target, parts, "hnsw") as folder:
        assert list(folder.iterdir()) == []
        (folder / "index.faiss").write_bytes(b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


def test_a_kill_between_the_renames_loses_no_index(tmp_path: Path) -> None:
    target = tmp_path / "index"
    target.mkdir()
    (target / "keys.npy").write_bytes(b"old")
    code = (
        "import os, shutil, signal, sys; from pathlib import Path; from verl.utils.siop.retriever import parts\n"
        "def killed(self, to, real=Path.rename):\n"
        "    if self.name == 'index' and self.parent.suffix == '.parts': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, to)\n"
        "target = Path(sys.argv[1])\n"
        "with parts.locked_parts(target) as (folder, _):\n"
        "    (folder / parts.NEW).mkdir(); Path.rename = killed; parts.replace(target, folder)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], timeout=120)
    assert done.returncode == -signal.SIGKILL and not target.exists()
    with locked_parts(target):
        assert (target / "keys.npy").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_old_index_is_gone_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "index"
    target.mkdir()
    (target / "keys.npy").write_bytes(b"old")
    seen: list[bytes] = []
    rmtree = shutil.rmtree

    def noting(path: Path, **options: Any) -> None:
        if path.name == OLD and path.exists():
            seen.append((target / "keys.npy").read_bytes())
        rmtree(path, **options)

    with locked_parts(target) as (parts, _):
        (parts / NEW).mkdir()
        (parts / NEW / "keys.npy").write_bytes(b"new")
        monkeypatch.setattr(shutil, "rmtree", noting)
        replace(target, parts)
    assert seen == [b"new"]


def test_a_folder_that_is_named_like_the_parts_is_not_emptied(corpus: Path, tmp_path: Path) -> None:
    mine = tmp_path / "index.parts"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    for go_on in (True, False):
        with pytest.raises(
            CorpusError, match=r"index.parts holds thesis.tex, which no build left there; choose another"
        ):
            Bm25Index.build(corpus, tmp_path / "index", go_on=go_on, show_progress=False)
    assert (mine / "thesis.tex").read_text() == "x"


def test_an_error_of_a_build_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"), locked_parts(tmp_path / "index"):
        raise FileNotFoundError("gone")
    assert not any(tmp_path.iterdir())


def test_rebuilding_begins_with_the_first_block(corpus: Path, tmp_path: Path) -> None:
    with locked_parts(tmp_path / "index") as (parts, _):
        (parts / "block-00000").mkdir()
        (parts / "block.new").mkdir()
    Bm25Index.build(corpus, tmp_path / "index", go_on=False, show_progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "index"]


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["settings"].update(k1=0.9),
        lambda fields: fields["files"].pop("bounds.npy"),
        lambda fields: fields.update(self_test=[]),
        lambda fields: fields["corpus"].update(documents=59),
        lambda fields: fields.pop("sha256"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(corpus: Path, tmp_path: Path, change: object) -> None:
    Bm25Index.build(corpus, tmp_path / "index", show_progress=False)
    path = tmp_path / "index" / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)  # type: ignore[operator]
    path.write_text(json.dumps(fields))
    with pytest.raises(
        IndexFolderError, match=r"manifest.json is damaged or of another version; build the index again"
    ):
        Bm25Index.load(tmp_path / "index")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pq"}, "kind is 'pq', known are bm25, documents, flat"),
        ({"kind": "flat"}, "settings.shard_rows is None, a whole number from 1 is expected"),
        (
            {"kind": "documents"},
            r"files has other names than kind documents \(bounds.npy, documents.npy, impacts.npy\)",
        ),
    ],
)
def test_a_manifest_that_lists_other_files_is_refused(
    corpus: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    Bm25Index.build(corpus, tmp_path / "index", show_progress=False)
    path = tmp_path / "index" / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]
    path.write_text(manifest_text(fields | changes))
    with pytest.raises(IndexFolderError, match=message):
        read_manifest(tmp_path / "index")


def replaced_by(corpus: Path, text: str | None) -> None:
    """Another file of that name, as a download that ends in a rename makes it; None for no file."""
    if text is None:
        corpus.unlink()
        return
    other = corpus.with_name("other")
    other.write_text(text)
    os.replace(other, corpus)


REVERSED = "reversed"


@pytest.mark.parametrize("text", [REVERSED, '{"id": 1, "contents": "short"}\n', "", None])
@pytest.mark.parametrize("kind", ["bm25", "documents"])
def test_a_corpus_that_is_replaced_during_a_build_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, text: str | None
) -> None:
    if text == REVERSED:  # the same lines, so that every offset is still that of a line
        text = "".join(reversed(corpus.read_text().splitlines(keepends=True)))
    module, name, index = {
        "bm25": (bm25, "merge", Bm25Index),
        "documents": (documents, "write_manifest", Documents),
    }[kind]
    real = getattr(module, name)

    def replacing(*args: object, **options: object) -> None:
        replaced_by(corpus, text)
        real(*args, **options)

    monkeypatch.setattr(module, name, replacing)
    with pytest.raises(CorpusError, match=r"c\.jsonl has changed while it was (indexed|read); begin again"):
        index.open(corpus, tmp_path / "index", show_progress=False)  # type: ignore[attr-defined]
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("kind", [Bm25Index, Documents])
def test_a_corpus_that_is_replaced_after_it_was_checked_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Bm25Index] | type[Documents]
) -> None:
    kind.open(corpus, tmp_path / "index", show_progress=False)
    mapped = kind._mapped

    def replacing(*args: object) -> object:
        replaced_by(corpus, "".join(reversed(corpus.read_text().splitlines(keepends=True))))
        return mapped(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "_mapped", replacing)
    with pytest.raises(CorpusError, match=r"c\.jsonl has changed while it was checked; begin again"):
        kind.open(corpus, tmp_path / "index", show_progress=False)
