"""Folders that builds put in the place of others: killed, at once, beside files of the user's, over changed sources."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_trees import write_jsonl
from verl.utils.siop import files
from verl.utils.siop.data import build as module
from verl.utils.siop.data.build import build
from verl.utils.siop.data.cli import main
from verl.utils.siop.data.manifest import FolderError, Manifest, compare, read_manifest, rows_of
from verl.utils.siop.data.select import Options
from verl.utils.siop.data.sources import SourceError
from verl.utils.siop.files import InUse, put_in_place, workplace


@pytest.fixture
def options(tmp_path: Path) -> Options:
    rows = [{"id": i, "question": f"who is {i}?", "answer": "me"} for i in range(4)]
    source = write_jsonl(tmp_path / "mine.jsonl", rows)
    return Options(out=tmp_path / "made" / "out", source=(f"train={source}",), prompt="bare")


def built(options: Options) -> Manifest:
    manifest = build(options)
    assert manifest is not None
    return manifest


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is the user's ----------------------------------------------------------------------------------------------


def test_files_of_the_user_are_not_deleted(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    built(options)
    notes = options.out / "notes.md"
    notes.write_text("mine")
    assert build(options) is None  # nothing to do, nothing in the way
    (options.out / "train.parquet").unlink()
    command = ["build", "--source", *options.source, "--prompt", "bare", "--out", str(options.out)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "lacks train.parquet, and building it anew would delete notes.md" in error and "--force" in error
    assert notes.read_text() == "mine"
    notes.rename(options.out.parent / "notes.md")
    assert main(command) == 0 and names(options.out) == ["manifest.json", "overrides.yaml", "train.parquet"]


# --- sources ---------------------------------------------------------------------------------------------------------


def test_sources_of_one_name_are_told_apart(options: Options, tmp_path: Path) -> None:
    def source(folder: str, who: str) -> str:
        return f"train={write_jsonl(tmp_path / folder / 'part.jsonl', [{'question': f'who is {who}?', 'answer': 'x'}])}"

    two = replace(options, source=(source("s1", "a"), source("s2", "b")))
    built(two)
    assert build(two) is None
    other = tmp_path / "other"
    source("s1", "c")
    with pytest.raises(FolderError, match=r"holds other data: sources\.0 train part part\.jsonl: [0-9a-f]{64} \| "):
        build(two)
    built(replace(two, out=other))
    lines = "\n".join(compare(options.out, other))
    assert "sources.train part.jsonl.sha256: " in lines and "sources.train part.jsonl #2" not in lines
    with pytest.raises(FolderError, match="holds other data"):  # the rows would stand in another order
        build(replace(two, out=other, source=two.source[::-1]))


def test_a_source_that_changes_while_it_is_read_is_refused(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = write_jsonl(tmp_path / "later.jsonl", [{"question": "who is new?", "answer": "x"}])
    true = module.read_parts

    def slow(*arguments: Any) -> Any:
        os.replace(later, tmp_path / "mine.jsonl")
        return true(*arguments)

    monkeypatch.setattr(module, "read_parts", slow)
    with pytest.raises(SourceError, match=r"mine.jsonl was changed while it was read; build again"):
        build(options)
    assert not options.out.exists()
    monkeypatch.undo()
    built(options)
    assert [row["extra_info"]["question"] for row in rows_of(options.out / "train.parquet")] == ["who is new?"]


# --- killed, and at once ---------------------------------------------------------------------------------------------

# The build as it is, but it waits for a line before the folder is put in place.
WAITING = """
import sys
from verl.utils.siop.data import build as module
from verl.utils.siop.data.cli import main
true = module.put_in_place
def waiting(new, out):
    print("written", flush=True)
    sys.stdin.readline()
    true(new, out)
module.put_in_place = waiting
sys.exit(main(sys.argv[1:]))
"""


def waiting_build(options: Options, seed: int) -> subprocess.Popen[str]:
    words = ["build", "--source", *options.source, "--prompt", "bare", "--out", str(options.out), "--force"]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *words, "--seed", str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    return process


def test_what_a_killed_build_has_left_is_swept_by_the_next(options: Options) -> None:
    built(options)
    with waiting_build(options, seed=2) as process:
        process.send_signal(signal.SIGKILL)
    assert names(options.out.parent) == [".out.partial", "out"] and read_manifest(options.out).build["seed"] == 1
    built(replace(options, seed=3, force=True))
    assert names(options.out.parent) == ["out"] and read_manifest(options.out).build["seed"] == 3


def test_two_builds_of_a_folder_do_not_meet(options: Options) -> None:
    built(options)
    with waiting_build(options, seed=2) as process:
        with pytest.raises(InUse, match=r"out is being written by another process, which has .*\.out\.partial"):
            build(replace(options, seed=3, force=True))
        process.communicate("\n", timeout=60)
    assert process.returncode == 0 and read_manifest(options.out).build["seed"] == 2
    built(replace(options, seed=3, force=True))
    assert names(options.out.parent) == ["out"]


def replaced(target: Path, text: str) -> None:
    with workplace(target) as place:
        (place / "new").mkdir()
        (place / "new" / "x").write_text(text)
        put_in_place(place / "new", target)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "a" / "target"
    for text in ("one", "two"):
        replaced(target, text)
        assert (target / "x").read_text() == text and names(tmp_path / "a") == ["target"]
    target.joinpath("x").unlink()
    target.rmdir()
    target.write_text("a file")
    replaced(target, "three")
    assert (target / "x").read_text() == "three" and names(tmp_path / "a") == ["target"]


def test_something_is_at_the_target_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    replaced(target, "one")
    monkeypatch.setattr(Path, "rename", lambda self, other: pytest.fail("two renames have a moment between them"))
    replaced(target, "two")
    assert (target / "x").read_text() == "two"


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target, place = tmp_path / "target", tmp_path / ".target.partial"
    replaced(target, "one")
    # Killed between the two renames.
    place.mkdir()
    target.rename(place / "before")
    with workplace(target) as found:
        assert (target / "x").read_text() == "one" and names(found) == []
    # And where the second one fails.
    with pytest.raises(FileNotFoundError), workplace(target) as found:
        put_in_place(found / "nothing", target)
    assert (target / "x").read_text() == "one" and names(tmp_path) == ["target"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write_whole(path, b"one")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write_whole(tmp_path / "folder", b"two")
    assert path.read_bytes() == b"one" and names(tmp_path) == ["folder", "x"]
