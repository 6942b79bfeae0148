"""The commands that ``launch_retriever.sh`` prints for making an index: each, as it is, makes the index it names."""

import sys
from pathlib import Path

import pytest
from corpora import write_corpus
from dense_world import passages, save_encoder
from launching import bash
from verl.utils.siop.retriever import build
from verl.utils.siop.retriever.folder import read_manifest


@pytest.mark.parametrize(("kind", "name"), [("bm25", "bm25"), ("flat", "e5")])
@pytest.mark.parametrize("named", [True, False])
def test_the_build_that_is_printed_makes_the_index(tmp_path: Path, kind: str, name: str, named: bool) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages(20))
    env: dict[str, str | Path] = {"RETRIEVER_CORPUS_FILE": corpus, "RETRIEVER_NAME": name}
    if named:
        env["RETRIEVER_INDEX_DIR"] = tmp_path / "index"
    if kind == "flat":
        env["RETRIEVER_MODEL"] = save_encoder(tmp_path / "encoder")
    shown = bash("launch_retriever.sh", "--dry-run", env=env)
    assert shown.returncode == 0, shown.stderr
    (first,) = [line.split("first: ")[1] for line in shown.stdout.splitlines() if "first: " in line]
    python, module_option, module, *arguments = first.split()
    assert (Path(python).resolve(), module_option) == (Path(sys.executable).resolve(), "-m")
    assert module == "verl.utils.siop.retriever.build"
    assert build.main(arguments) == 0
    target = tmp_path / ("index" if named else f"c.jsonl.{kind}")
    assert read_manifest(target).kind == kind
    # The server is given the same folder, or looks there by itself.
    assert f"--index {target}" in shown.stdout.split("first: ")[1].partition("\n")[2] or not named
