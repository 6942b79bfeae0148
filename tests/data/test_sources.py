"""Sources: bad input with a clear message, the hub and GitHub as local fakes, and nothing half written."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from data_trees import deepresearcher_tree, flashrag_tree, made_up, write_jsonl, write_parquet
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from verl.utils.siop.data import sources
from verl.utils.siop.data.build import build
from verl.utils.siop.data.cli import main
from verl.utils.siop.data.manifest import Manifest, read_manifest
from verl.utils.siop.data.select import Options
from verl.utils.siop.data.sources import SourceError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def own(out: Path, *paths: Path | str, **changes: Any) -> Manifest | None:
    return build(Options(out=out, source=tuple(map(str, paths)), prompt="bare", **changes))


def bad(tmp_path: Path, *paths: Path | str) -> str:
    """The message with which these sources are refused; nothing is left behind."""
    with pytest.raises(SourceError) as error:
        own(tmp_path / "out", *paths)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    assert "\n" not in str(error.value)
    return str(error.value)


# --- bad input -------------------------------------------------------------------------------------------------------

ROW = {"id": "1", "question": "who?", "answer": "me"}


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    for write, suffix in ((write_jsonl, "jsonl"), (write_parquet, "parquet")):
        message = bad(tmp_path, f"eval={write(tmp_path / f'x.{suffix}', [{'query': 'who?', 'label': 'me'}])}")
        assert f"x.{suffix}: the columns label, query fit no known shape" in message
        assert "flashrag: question, golden_answers" in message and "plain: question, answer|answers" in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "2"}, "'question' is missing"),
        ({**ROW, "question": ["who?"]}, "'question' is a text, got list"),
        ({**ROW, "question": "\ud800?"}, "surrogates not allowed"),
        ({**ROW, "answer": "\ud800"}, "surrogates not allowed"),
        ({**ROW, "dataset": "Natural Questions"}, "the set is called 'Natural Questions'; a name has letters"),
        ({**ROW, "extra_info": "x"}, "'extra_info' and 'reward_model' are objects"),
        ([1], "a row is an object with named columns, got list"),
        (ROW, "id '1' of set 'x', split '' is that of line 1 of"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [ROW, row])
    found = bad(tmp_path, f"eval={path}")
    assert f"{path}: line 2: " in found and message in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [{"role": "user", "content": "Be brief.\nWho?"}]}, "several lines and no 'Question:'"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "no user message with text in 'prompt'"),
        ({"reward_model": {"ground_truth": {"answer": "x"}}}, "needs the key target or ground_truth"),
    ],
)
def test_a_bad_row_in_verls_format(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    row = {"data_source": "nq", "prompt": [{"role": "user", "content": "Who?"}], "reward_model": {"ground_truth": "me"}}
    path = write_jsonl(tmp_path / "x.jsonl", [row, {**row, **changes}])
    found = bad(tmp_path, f"eval={path}")
    assert f"{path}: line 2: " in found and message in found


def test_broken_json_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + '{"id": "2", "question"\n')
    assert f"{path}: line 3: not JSON: " in (message := bad(tmp_path, f"eval={path}"))
    assert """it begins '{"id": "2", "question"'""" in message
    path.write_bytes(b'{"question": "\xff", "answer": "x"}\n')
    assert "line 1: not JSON: 'utf-8' codec" in bad(tmp_path, f"eval={path}")
    whole = tmp_path / "x.json"
    for text, message in (('{"question": 1}', "holds a list of rows, got dict"), ("[1", "not JSON")):
        whole.write_text(text)
        assert message in bad(tmp_path, f"eval={whole}")


def test_a_gzip_that_was_cut_short_is_refused_and_a_whole_one_read(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in made_up("nq", "test")).encode())
    path = tmp_path / "nq" / "test.jsonl.gz"
    path.parent.mkdir()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"not gzip", whole[:200] + b"xx" + whole[202:]):
        path.write_bytes(damaged)
        assert f"{path}: damaged after line " in bad(tmp_path, path)
    path.write_bytes(whole)
    manifest = own(tmp_path / "out", path)
    assert manifest is not None and manifest.outputs["eval.parquet"].sets["nq"].rows == 20


def test_a_parquet_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "test.parquet", made_up("nq", "test"))
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: not a whole parquet file" in bad(tmp_path, path)


def test_empty_and_missing_files(tmp_path: Path) -> None:
    empty = tmp_path / "test.jsonl"
    empty.write_text("\n")
    assert bad(tmp_path, empty) == f"{empty}: the file has no rows"
    assert bad(tmp_path, "eval=no.jsonl") == "--source eval=no.jsonl: no such file or folder"
    (tmp_path / "empty").mkdir()
    assert "the folder holds no .jsonl" in bad(tmp_path, tmp_path / "empty")
    text = tmp_path / "x.csv"
    text.write_text("x")
    assert "x.csv: files of this name are not read; allowed are .jsonl, .jsonl.gz, .json, .parquet" in bad(
        tmp_path, text
    )


def test_a_file_must_tell_whether_it_trains(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "mine.jsonl", [ROW])
    message = bad(tmp_path, path)
    assert (
        f"{path}: line 1: the split '' tells neither train nor eval" in message and "train=FILE or eval=FILE" in message
    )
    assert own(tmp_path / "out", f"eval:squad={path}") is not None
    assert list(read_manifest(tmp_path / "out").outputs["eval.parquet"].sets) == ["squad"]


def test_a_preset_names_what_its_folder_lacks(tmp_path: Path) -> None:
    tree = flashrag_tree(tmp_path / "tree")
    options = Options(out=tmp_path / "out", preset="searchr1", source=(str(tree),), prompt="bare")
    (tree / "musique" / "dev.jsonl").rename(tree / "musique" / "dev.csv")
    with pytest.raises(SourceError, match=r"no musique/dev with one of .* takes musique for eval; .* with --eval"):
        build(options)
    write_jsonl(tree / "musique" / "dev.jsonl", [])
    with pytest.raises(SourceError, match=r"musique/dev.jsonl: the file has no rows"):
        build(options)
    write_jsonl(tree / "musique" / "dev.jsonl", [{**ROW, "dataset": "nq"}])
    with pytest.raises(SourceError, match=r"no row of set 'musique' for eval; found nq, "):
        build(options)
    write_jsonl(tree / "musique" / "dev.jsonl", made_up("musique", "dev"))
    write_parquet(tree / "musique" / "dev.parquet", made_up("musique", "dev"))
    with pytest.raises(SourceError, match=r"both dev.jsonl and dev.parquet hold musique/dev; leave one"):
        build(options)


# --- fetched ---------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_for_the_files_of_the_chosen_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = flashrag_tree(tmp_path / "snapshots" / COMMIT)
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    manifest = build(Options(out=tmp_path / "out", preset="searchr1", train="nq", eval="bamboogle", prompt="bare"))
    assert manifest is not None
    assert asked == {
        "repo": "RUC-NLPIR/FlashRAG_datasets",
        "repo_type": "dataset",
        "revision": "main",
        "allow_patterns": ["bamboogle/test.jsonl", "nq/train.jsonl"],
    }
    assert {(source.name, source.revision) for source in manifest.sources} == {
        ("nq/train.jsonl", COMMIT),
        ("bamboogle/test.jsonl", COMMIT),
    }
    assert manifest.sources[0].repo == "https://huggingface.co/datasets/RUC-NLPIR/FlashRAG_datasets"

    def unreachable(repo: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection, and nothing cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(SourceError, match=r"RUC-NLPIR/FlashRAG_datasets at main: LocalEntry.*use --source DIR"):
        build(Options(out=tmp_path / "other", preset="searchr1", prompt="bare"))


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What a local server has in the place of GitHub; its log is the list ``asked``."""
    root = tmp_path / "github"
    root.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            with (tmp_path / "asked").open("a") as file:
                file.write(self.path + "\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(sources, "GITHUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield root / "GAIR-NLP" / "DeepResearcher"
    server.shutdown()
    server.server_close()


def asked(tmp_path: Path) -> int:
    return len((tmp_path / "asked").read_text().splitlines())


def test_a_file_of_github_is_fetched_once_for_a_commit(
    github: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deepresearcher_tree(github / COMMIT)
    options = Options(out=tmp_path / "out", preset="deepresearcher", revision=COMMIT, prompt="bare")
    assert main(["fetch", "--preset", "deepresearcher", "--revision", COMMIT]) == 0
    assert f"deepresearcher at {COMMIT} is in {tmp_path}/home" in capsys.readouterr().out
    assert asked(tmp_path) == 2
    manifest = build(options)
    assert manifest is not None and asked(tmp_path) == 2
    assert {source.revision for source in manifest.sources} == {COMMIT}
    published = (github / COMMIT / "data" / "test.parquet").read_bytes()
    git = subprocess.run(["git", "hash-object", "--stdin"], input=published, capture_output=True, check=True)
    assert manifest.sources[1].git_blob == git.stdout.decode().strip()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert build(options) is None
    with pytest.raises(SourceError, match=r"/main/data/test.parquet: not in the cache .*HF_HUB_OFFLINE=1"):
        build(Options(out=tmp_path / "other", preset="deepresearcher", prompt="bare"))


def test_what_cannot_be_fetched_is_not_kept(github: Path, tmp_path: Path) -> None:
    options = Options(out=tmp_path / "out", preset="deepresearcher", train="none", prompt="bare")
    with pytest.raises(SourceError, match=r"/main/data/test.parquet: HTTPStatusError: .*404.*use --source DIR"):
        build(options)
    (github / "main" / "data").mkdir(parents=True)
    (github / "main" / "data" / "test.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(SourceError, match="a pointer of Git LFS, not the file itself"):
        build(options)
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    deepresearcher_tree(github / "main")
    assert build(options) is not None
    # What a branch holds may have changed.
    before = asked(tmp_path)
    assert build(options) is None and asked(tmp_path) == before + 1


def test_options_without_effect_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "nq" / "test.jsonl", [ROW])
    build_args = ["build", "--out", str(tmp_path / "out"), "--prompt", "bare"]
    for arguments, message in (
        ([], "name a --preset to fetch, or your own files with --source"),
        (["--source", str(path), "--revision", "x"], "--revision x has no effect on files of your own"),
        (
            ["--preset", "searchr1", "--source", str(path), "--revision", "x"],
            "--revision x has no effect with --source",
        ),
    ):
        assert main([*build_args, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["build", "--out", str(tmp_path / "out"), "--source", str(path)]) == 2
    assert "--model ID), or --prompt: hermes-thinking, " in capsys.readouterr().err


# --- stopped in the middle -------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from verl.utils.siop.data.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(main(sys.argv[1:]))
"""
# The build as it is, but slow, and it says when it has begun to write.
SLOW = """
import sys, time
from verl.utils.siop.data import build as module
from verl.utils.siop.data.cli import main
true = module._write_parquet
def slow(path, rows):
    result = true(path, rows)
    print("writing", flush=True)
    time.sleep(60)
    return result
module._write_parquet = slow
sys.exit(main(sys.argv[1:]))
"""


def build_command(script: str, tree: Path, out: Path, *more: str) -> list[str]:
    words = ["build", "--preset", "searchr1", "--source", str(tree), "--prompt", "bare", "--out", str(out), *more]
    return [sys.executable, "-c", script, *words]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def existing(tmp_path: Path) -> tuple[Path, Path]:
    """A tree, and a folder that was built from it."""
    tree, out = flashrag_tree(tmp_path / "tree"), tmp_path / "made" / "out"
    build(Options(out=out, preset="searchr1", source=(str(tree),), prompt="bare"))
    return tree, out


def test_a_full_disk_leaves_what_was_there(existing: tuple[Path, Path]) -> None:
    tree, out = existing
    before = contents(out)
    done = subprocess.run(
        build_command(LIMITED, tree, out, "--seed", "2", "--force"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert f"error: {out} cannot be written: " in done.stderr and "File too large" in done.stderr
    assert "what was there is unchanged" in done.stderr and "Traceback" not in done.stderr
    assert contents(out) == before and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("anew", [True, False])
def test_ctrl_c_leaves_what_was_there(existing: tuple[Path, Path], anew: bool) -> None:
    tree, out = existing
    before = contents(out)
    target = out.with_name("new") if anew else out
    command = build_command(SLOW, tree, target, "--seed", "2", "--force")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert len(list(out.parent.iterdir())) == 2
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith("interrupted; no folder is left half written\n")
    assert contents(out) == before and list(out.parent.iterdir()) == [out]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "nq" / "test.jsonl", [ROW])
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert main(["build", "--out", str(out), "--source", str(path), "--prompt", "bare"]) == 2
    assert f"error: {out} cannot be written: " in capsys.readouterr().err
