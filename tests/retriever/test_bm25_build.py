"""Building the index of BM25: in blocks, interrupted, with bad corpora, on a full disk."""

import gzip
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bm25_cases import files_of, random_passages
from corpora import write_corpus
from verl.utils.siop.retriever import bm25_blocks, bm25_estimate, build
from verl.utils.siop.retriever.bm25 import Bm25Index
from verl.utils.siop.retriever.corpus import CorpusError
from verl.utils.siop.retriever.parts import locked_parts

PASSAGES = random_passages(600)
BLOCK = 2000  # tokens; the passages are eight blocks
# A build in a process of its own, with BLOCK tokens a block, which does something at the n-th call of a function.
CHILD = """
import os, resource, signal, sys
from verl.utils.siop.retriever import bm25, bm25_blocks, bm25_merge, build
bm25_blocks.BLOCK_TOKENS = {block}
calls = []
def hooked(module, name, n, act):
    original = getattr(module, name)
    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == n:
            act()
        return original(*args, **kwargs)
    setattr(module, name, call)
{hook}
sys.exit(build.main(["bm25", "--corpus", {corpus!r}, "--index", {out!r}]))
"""


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small blocks; gets the number of documents of every block that is written."""
    monkeypatch.setattr(bm25_blocks, "BLOCK_TOKENS", BLOCK)
    written: list[int] = []
    write = bm25_blocks.Inverter.write

    def counting(self: bm25_blocks.Inverter, folder: Path) -> None:
        written.append(len(self))
        write(self, folder)

    monkeypatch.setattr(bm25_blocks.Inverter, "write", counting)
    return written


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an index that was built in one block."""
    folder = tmp_path_factory.mktemp("whole")
    Bm25Index.build(write_corpus(folder / "c.jsonl", PASSAGES), folder / "index", show_progress=False)
    return files_of(folder / "index")


def child(folder: Path, hook: str) -> subprocess.CompletedProcess[str]:
    corpus = write_corpus(folder / "c.jsonl", PASSAGES)
    code = CHILD.format(block=BLOCK, hook=hook, corpus=str(corpus), out=str(folder / "index"))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_blocks_do_not_change_the_index(tmp_path: Path, blocks: list[int], whole: dict[str, bytes]) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    Bm25Index.build(corpus, tmp_path / "index", show_progress=False)
    assert len(blocks) == 8 and sum(blocks) == len(PASSAGES)
    assert files_of(tmp_path / "index") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "index"]


@pytest.mark.parametrize(
    ("hook", "status", "left"),
    [
        ("hooked(bm25_blocks, 'write_array', 24, lambda: os.kill(os.getpid(), signal.SIGKILL))", -signal.SIGKILL, 5),
        ("hooked(bm25_blocks, 'write_array', 24, lambda: os.kill(os.getpid(), signal.SIGINT))", 130, 5),
        ("hooked(bm25_merge, '_of_block', 3, lambda: os.kill(os.getpid(), signal.SIGKILL))", -signal.SIGKILL, 0),
        ("hooked(bm25, '_write_manifest', 1, lambda: os.kill(os.getpid(), signal.SIGKILL))", -signal.SIGKILL, 0),
    ],
)
def test_an_interrupted_build_goes_on_to_the_same_bytes(
    tmp_path: Path, blocks: list[int], whole: dict[str, bytes], hook: str, status: int, left: int
) -> None:
    result = child(tmp_path, hook)
    assert result.returncode == status, result.stderr
    assert not (tmp_path / "index").exists()
    if status == 130:
        assert result.stderr.splitlines()[-1] == "interrupted; the same command goes on from here"
    Bm25Index.open(tmp_path / "c.jsonl", tmp_path / "index", show_progress=False)
    assert len(blocks) == left  # 24: the third array of the fourth block
    assert files_of(tmp_path / "index") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "index"]


def test_a_full_disk_ends_a_build_with_one_line_and_loses_no_block(
    tmp_path: Path, blocks: list[int], whole: dict[str, bytes]
) -> None:
    # In the merge, as that writes the largest files.
    limit = "hooked(bm25, 'merge', 1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))"
    result = child(tmp_path, limit)
    assert result.returncode == 1
    named = rf"error: cannot write {tmp_path}/index\.parts/index/(documents|impacts)\.npy: File too large"
    assert re.fullmatch(named, result.stderr.splitlines()[-1])
    assert sorted(path.name for path in (tmp_path / "index.parts").iterdir()) == [f"block-0000{i}" for i in range(8)]
    limit = "hooked(bm25_blocks, 'write_array', 1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))"
    for name in ("block-00006", "block-00007"):
        shutil.rmtree(tmp_path / "index.parts" / name)
    assert child(tmp_path, limit).returncode == 1
    assert sorted(path.name for path in (tmp_path / "index.parts").iterdir()) == [f"block-0000{i}" for i in range(6)]
    Bm25Index.build(tmp_path / "c.jsonl", tmp_path / "index", show_progress=False)
    assert len(blocks) == 2 and files_of(tmp_path / "index") == whole


def interrupt(monkeypatch: pytest.MonkeyPatch, corpus: Path, index: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bm25_blocks, "check_ids", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Bm25Index.build(corpus, index, show_progress=False)


def lines_to(edit: Callable[[list[bytes]], None]) -> Callable[[Path, Path], None]:
    def change(corpus: Path, _: Path) -> None:
        stat = corpus.stat()
        lines = corpus.read_bytes().splitlines(keepends=True)
        edit(lines)
        corpus.write_bytes(b"".join(lines))
        os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return change


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "written"),
    [
        (lambda corpus, parts: None, 0),
        (lines_to(lambda lines: lines.reverse()), 8),
        (lines_to(lambda lines: lines.append(b'{"id": 1, "contents": "more"}\n')), 1),
        (lines_to(lambda lines: lines.__setitem__(-1, lines[-1].replace(b"w1", b"w2"))), 1),
        (lines_to(lambda lines: lines.clear()), 0),
        (lambda corpus, parts: flip(parts / "block-00002" / "counts.npy"), 6),
        (lambda corpus, parts: (parts / "block-00005" / "block.json").write_text("{"), 3),
        (lambda corpus, parts: shutil.rmtree(parts / "block-00000"), 8),
    ],
)
def test_only_blocks_that_are_whole_and_of_the_corpus_are_kept(
    tmp_path: Path,
    blocks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, Path], None],
    written: int,
) -> None:
    corpus, index = write_corpus(tmp_path / "c.jsonl", PASSAGES), tmp_path / "index"
    interrupt(monkeypatch, corpus, index)
    change(corpus, tmp_path / "index.parts")
    blocks.clear()
    if not corpus.stat().st_size:
        with pytest.raises(CorpusError, match="is empty"):
            Bm25Index.build(corpus, index, show_progress=False)
        assert not (tmp_path / "index.parts").exists()
        return
    Bm25Index.build(corpus, index, show_progress=False)
    assert len(blocks) == written
    Bm25Index.build(corpus, tmp_path / "clean", show_progress=False)
    assert files_of(index) == files_of(tmp_path / "clean")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"id": 1, "contents": "a"}\n{"id": 2, "contents"', "line 2: not valid JSON"),
        ('{"id": 1, "contents": "a"}\n\n["b"]', "line 3: expected an object"),
        ('{"id": 1, "text": "a"}', "line 1: 'contents' must be a string, got None"),
        (
            '{"title": "t", "id": 1}',
            r"got None \(the keys are 'title', 'id'\); it is the title in quotes, a line break",
        ),
        (
            '{"contents": "a"}',
            r"line 1: 'id' must be .* got None \(the keys are 'contents'\); the number of the line will",
        ),
        ('{"id": 1, "contents": "a"}\n{"id": 2, "contents": "\\ud83d"}', "line 2: half a surrogate pair"),
    ],
)
def test_bad_corpus_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(text)
    with pytest.raises(CorpusError, match=message) as caught:
        Bm25Index.open(path, tmp_path / "index", show_progress=False)
    assert "c.jsonl" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_bad_line_costs_no_block_before_it(tmp_path: Path, blocks: list[int]) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    good = corpus.read_bytes()
    corpus.write_bytes(good.replace(b'{"id": "p500"', b'{"id": "p500'))
    with pytest.raises(CorpusError, match="line 501: not valid JSON"):
        Bm25Index.open(corpus, tmp_path / "index", show_progress=False)
    done = len(blocks)
    corpus.write_bytes(good)
    Bm25Index.open(corpus, tmp_path / "index", show_progress=False)
    assert done == 5 and len(blocks) == 8


def test_an_id_that_is_there_twice_is_named_with_both_lines(tmp_path: Path, blocks: list[int]) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    text = corpus.read_text()
    corpus.write_text(text.replace('"p590"', '"p17"').replace('{"id": "p3"', '\n{"id": "p3"'))
    with pytest.raises(CorpusError, match=r"c\.jsonl, lines 19 and 592: the id 'p17' is there twice"):
        Bm25Index.open(corpus, tmp_path / "index", show_progress=False)
    corpus.write_text(text.replace('"p590"', "17").replace('"p17"', '"17"'))  # another type is another id
    assert len(Bm25Index.open(corpus, tmp_path / "index", show_progress=False)) == len(PASSAGES)


def test_a_compressed_corpus_is_refused_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": 1, "contents": "a"}\n'))
    with pytest.raises(CorpusError, match=rf"compressed \(gzip\); unpack it first: gunzip -k {path}"):
        Bm25Index.open(path, tmp_path / "index", show_progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl.gz"]


def test_a_foreign_folder_is_never_replaced(tmp_path: Path, blocks: list[int]) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CorpusError, match="mine is not empty"):
        Bm25Index.open(corpus, tmp_path / "mine", show_progress=False)
    with pytest.raises(CorpusError, match=r"c\.jsonl is a file; the index needs a folder"):
        Bm25Index.build(corpus, corpus, show_progress=False)
    with pytest.raises(CorpusError, match=r"cannot write /proc/index\.parts: .*; choose another index folder"):
        Bm25Index.build(corpus, "/proc/index", show_progress=False)
    assert not blocks  # refused before the work
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "mine"]
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_the_estimate_is_said_before_and_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    corpus, index = write_corpus(tmp_path / "c.jsonl", random_passages(5000)), tmp_path / "index"
    Bm25Index.build(corpus, index, show_progress=False)
    assert "min of one core" not in caplog.text  # a small corpus takes seconds
    monkeypatch.setattr(bm25_estimate, "SMALL_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    caplog.clear()
    Bm25Index.build(corpus, index, show_progress=False)
    assert [record.levelname for record in caplog.records[:2]] == ["INFO", "WARNING"]
    assert "1 min of one core" in caplog.messages[0] and "has only 0.0 GB free" in caplog.messages[1]
    expected = bm25_estimate.estimate(corpus)
    assert expected.documents == pytest.approx(5000, rel=0.05)
    # A posting takes 8 bytes of the index, a word 20.
    assert expected.kept == pytest.approx(sum(map(len, files_of(index).values())), rel=0.35)
    assert expected.kept < expected.disk < 2 * expected.kept


def test_the_command_says_that_an_index_is_up_to_date(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    corpus = write_corpus(tmp_path / "c.jsonl", PASSAGES)
    command = ["bm25", "--corpus", str(corpus)]
    assert build.main(command) == 0
    manifest = tmp_path / "c.jsonl.bm25" / "manifest.json"
    built = manifest.stat().st_mtime_ns
    assert build.main(command) == 0 and "c.jsonl.bm25 is up to date" in caplog.messages[-1]
    assert manifest.stat().st_mtime_ns == built
    assert build.main([*command, "--rebuild"]) == 0
    assert manifest.stat().st_mtime_ns > built


def test_a_second_process_waits_and_uses_what_the_first_has_built(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    corpus, index = write_corpus(tmp_path / "c.jsonl", PASSAGES), tmp_path / "index"

    def wait(then: Any) -> Any:
        while f"another process builds {index}" not in caplog.text:
            assert not then.done()
        return then

    with ThreadPoolExecutor(1) as pool:
        with locked_parts(index) as (parts, _):
            second = wait(pool.submit(Bm25Index.open, corpus, index, show_progress=False))
            Bm25Index._build(corpus, index, parts, False)
        assert len(second.result(60)) == len(PASSAGES)
    assert caplog.text.count("indexed 600 documents") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "index"]
