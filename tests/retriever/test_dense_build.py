"""``retriever.build encode|import|index|verify``: what is built, what goes on after a stop, what is refused."""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import write_corpus
from dense_world import command, minilm, passages, save_encoder
from verl.utils.siop.errors import SiopError
from verl.utils.siop.retriever import dense
from verl.utils.siop.retriever.ann import load_faiss
from verl.utils.siop.retriever.encoder import Encoder
from verl.utils.siop.retriever.folder import read_manifest
from verl.utils.siop.retriever.vector_job import STATE_FILE


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    """An index of 90 passages in four shards."""
    folder = tmp_path_factory.mktemp("flat")
    corpus = write_corpus(folder / "c.jsonl", passages(90))
    command("encode", "--corpus", corpus, "--model", encoder, "--passage-prefix", "passage: ", "--shard-rows", 25)
    return folder / "c.jsonl.flat"


def vectors_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "vectors").iterdir()}


def in_process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    code = (
        "import sys; from dense_world import command; from verl.utils.siop.errors import SiopError\n"
        "try: command(*sys.argv[1:])\n"
        "except SiopError as error: sys.exit(f'error: {error}')"
    )
    helpers = str(Path(__file__).resolve().parents[1] / "helpers")
    environment = {**os.environ, "PYTHONPATH": f"{helpers}:{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, env=environment, text=True, stderr=subprocess.PIPE, **options)


def test_encode_makes_an_index_with_the_vectors_of_the_encoder(flat: Path, encoder: Path) -> None:
    manifest = read_manifest(flat)
    assert manifest.kind == "flat" and manifest.corpus.documents == 90 and len(manifest.self_test) == 20
    assert {name for name in manifest.files if name.startswith("vectors")} == {
        f"vectors/0000{i}.f16.npy" for i in range(4)
    }
    assert manifest.settings["encoder"]["passage_prompt"] == "passage: "
    assert manifest.settings["encoder"]["pooling"] == "mean"
    stored = np.concatenate([np.load(flat / "vectors" / f"0000{i}.f16.npy") for i in range(4)])
    found = Encoder.load(str(encoder), passage_prompt="passage: ").encode_passages(passages(90))
    np.testing.assert_allclose(stored.astype(np.float32), found, atol=1e-3)
    assert not (flat / STATE_FILE).exists()


def test_a_whole_index_is_left_as_it_is_and_never_replaced(
    flat: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (flat / "manifest.json").stat().st_mtime_ns
    corpus = flat.with_name("c.jsonl")
    again = ("encode", "--corpus", corpus, "--model", encoder, "--shard-rows", 25)
    command(*again, "--passage-prefix", "passage: ")
    moved = save_encoder(tmp_path / "moved")  # the same weights
    command(*again[:3], "--model", moved, *again[5:], "--passage-prefix", "passage: ", "--dtype", "bfloat16")
    assert (flat / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(SiopError, match="passage_prompt is 'passage: ' there, 'text: ' now"):
        command(*again, "--passage-prefix", "text: ")
    other = write_corpus(tmp_path / "other.jsonl", passages(91))
    with pytest.raises(SiopError, match="corpus sha256 is"):
        command("encode", "--corpus", other, "--model", encoder, "--passage-prefix", "passage: ", "--index", flat)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(SiopError, match="mine is not empty and holds no index"):
        command("encode", "--corpus", other, "--model", encoder, "--index", tmp_path / "mine")


def test_a_killed_encode_goes_on_with_the_first_shard_that_is_not_whole(encoder: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages(3000))
    arguments = ("encode", "--corpus", corpus, "--model", encoder, "--shard-rows", 30, "--index")
    command(*arguments, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    process = in_process(*arguments, stopped)
    deadline = time.monotonic() + 120
    while not (stopped / "vectors" / "00003.f16.npy").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (stopped / "manifest.json").exists()
    with pytest.raises(SiopError, match="holds no index"):
        dense.load(stopped, show_progress=False)
    whole = json.loads((stopped / STATE_FILE).read_text())["shards"]
    assert 3 <= len(whole) < 100
    kept = {number: (stopped / "vectors" / f"{int(number):05d}.f16.npy").stat().st_mtime_ns for number in whole}
    damaged = stopped / "vectors" / "00001.f16.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    command(*arguments, stopped)
    assert vectors_of(stopped) == vectors_of(tmp_path / "whole")
    for number, written in kept.items():
        path = stopped / "vectors" / f"{int(number):05d}.f16.npy"
        assert (path.stat().st_mtime_ns == written) == (number != "1")
    dense.load(stopped, show_progress=False)


def test_what_was_begun_is_not_mixed_with_something_else(encoder: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages(60))
    arguments = ("encode", "--corpus", corpus, "--model", encoder, "--shard-rows", 20)
    process = in_process(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1300, 1300)))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    # The offsets fit; the first shard does not, and is not there by half.
    assert "error: cannot write" in errors and "00000.f16.npy (1408 bytes): File too large" in errors
    folder = tmp_path / "c.jsonl.flat"
    assert vectors_of(folder) == {}
    with pytest.raises(SiopError, match="max_passage_tokens is 200 there, 9 now"):
        command(*arguments, "--max-passage-tokens", 9)
    write_corpus(corpus, [*passages(59), "another"])
    with pytest.raises(SiopError, match="corpus sha256 is"):
        command(*arguments)
    write_corpus(corpus, passages(60))
    command(*arguments)
    assert len(dense.load(folder, show_progress=False)[0]) == 60


def test_too_little_room_is_known_before_the_start(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages(5))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(SiopError, match=r"to write, and 0.00 GB are free"):
        command("encode", "--corpus", corpus, "--model", encoder)


def test_ray_tasks_write_the_same_shards(flat: Path, encoder: Path, tmp_path: Path) -> None:
    target = tmp_path / "ray"
    arguments = ("encode", "--corpus", flat.with_name("c.jsonl"), "--model", encoder, "--passage-prefix", "passage: ")
    command(*arguments, "--shard-rows", 25, "--index", target, "--ray")
    assert vectors_of(target) == vectors_of(flat)
    assert dense.load(target, show_progress=False)[0].search(passages(3), 1)


def test_a_process_per_device_gives_the_same_vectors(flat: Path, encoder: Path, tmp_path: Path) -> None:
    arguments = ("encode", "--corpus", flat.with_name("c.jsonl"), "--model", encoder, "--passage-prefix", "passage: ")
    command(*arguments, "--shard-rows", 45, "--index", tmp_path / "i", "--devices", "cpu,cpu")
    one, other = ([np.load(path) for path in sorted((f / "vectors").iterdir())] for f in (flat, tmp_path / "i"))
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), atol=1e-3)
    assert read_manifest(tmp_path / "i").measured["encoded"]["devices"] == ["cpu", "cpu"]


def faiss_file(path: Path, vectors: np.ndarray, kind: str = "IndexFlatIP") -> Path:
    faiss = load_faiss()
    index = getattr(faiss, kind)(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path


TEXTS = passages(40)


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """A corpus, a file that faiss wrote, with vectors of MiniLM and E5's prefix, and the vectors."""
    folder = tmp_path_factory.mktemp("prebuilt")
    vectors = Encoder.load(minilm(), passage_prompt="passage: ").encode_passages(TEXTS)
    return write_corpus(folder / "c.jsonl", TEXTS), faiss_file(folder / "e5_Flat.index", vectors), vectors


def import_(corpus: Path, file: Path, target: Path, *options: object, prefix: str = "passage: ") -> None:
    model = ("--model", minilm(), "--query-prefix", "query: ", "--passage-prefix", prefix)
    command("import", "--faiss", file, "--corpus", corpus, "--index", target, "--shard-rows", 16, *model, *options)


def test_import_takes_the_vectors_of_a_faiss_file(prebuilt: tuple[Path, Path, np.ndarray], tmp_path: Path) -> None:
    corpus, file, vectors = prebuilt
    import_(corpus, file, tmp_path / "i")
    shards = [np.load(tmp_path / "i" / "vectors" / f"0000{i}.f16.npy") for i in range(3)]
    assert (np.concatenate(shards) == vectors.astype(np.float16)).all()
    (index,) = dense.load(tmp_path / "i", show_progress=False)
    assert index.search(["the town founded by olaF 13?"], 1)[0][0][0]["id"].startswith("p")
    assert read_manifest(tmp_path / "i").measured["imported"]["file"].startswith("faiss e5_Flat.index, ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shuffled corpus", "the corpus is in another order (passage 0 has row 39"),
        ("other corpus", "no row of the file is near theirs"),
        ("longer corpus", "has 40 vectors, and .*c.jsonl 41 passages: another corpus"),
        ("prefix", "they were made with the prefix 'passage: ', not '' (--passage-prefix)"),
        ("truncated", "it was not downloaded or joined whole"),
        ("L2", "begins with b'IxF2', not with b'IxFI'"),
        ("not faiss", "begins with b'PK', not with"),
        ("length", "row 7: the vector has length 0.5, expected 1"),
        ("nan", "row 7: the vector has length nan, expected 1"),
        ("dimension", "vectors of 100 numbers, and .* gives 384: another encoder"),
        ("missing", "cannot read .*e5.index: No such file"),
    ],
)
def test_import_refuses_vectors_that_are_not_of_the_corpus_by_name(
    prebuilt: tuple[Path, Path, np.ndarray], tmp_path: Path, change: str, message: str
) -> None:
    corpus, _, vectors = prebuilt
    file, texts, prefix = tmp_path / "e5.index", list(TEXTS), "passage: "
    if change == "missing":
        with pytest.raises(SiopError, match=message):
            import_(corpus, file, tmp_path / "i")
        return
    changed = vectors.copy()
    if change == "length":
        changed[7] *= 0.5
    elif change == "nan":
        changed[7, 3] = np.nan
    elif change == "dimension":
        changed = changed[:, :100].copy()
    elif change == "shuffled corpus":
        texts.reverse()
    elif change == "other corpus":
        texts = [f"Quite another text about {i * 7} chemical elements and their uses." for i in range(40)]
    elif change == "longer corpus":
        texts.append("one more")
    elif change == "prefix":
        prefix = ""
    faiss_file(file, changed, "IndexFlatL2" if change == "L2" else "IndexFlatIP")
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
    elif change == "not faiss":
        file.write_bytes(b"PK")
    corpus = write_corpus(tmp_path / "c.jsonl", texts)
    pattern = message if ".*" in message else message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(SiopError, match=pattern):
        import_(corpus, file, tmp_path / "i", prefix=prefix)
    assert not (tmp_path / "i" / "manifest.json").exists()


def test_an_approximate_index_measures_its_recall_and_stands_alone(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = tmp_path / "queries.txt"
    queries.write_text("town by the Amo\n\nwho founded Town 37?\n")
    target = tmp_path / "hnsw"
    command("index", flat, "--kind", "hnsw_sq8", "--index", target, "--queries", queries)
    manifest = read_manifest(target)
    assert manifest.kind == "hnsw_sq8" and manifest.measured["queries"] == "2 given"
    assert set(manifest.measured["recall"]) == {"3", "10"} and manifest.measured["recall"]["10"] >= 0.9
    assert manifest.libraries["faiss"] == load_faiss().__version__
    (index,), (exact,) = dense.load(target, show_progress=False), dense.load(flat, show_progress=False)
    found, expected = index.search(["town by the Amo"], 10)[0], exact.search(["town by the Amo"], 10)[0]
    assert len({d["id"] for d, _ in found} & {d["id"] for d, _ in expected}) >= 8
    command("verify", target)
    with pytest.raises(SiopError, match="holds an index of kind hnsw_sq8; only one of kind flat"):
        command("index", target, "--kind", "hnsw")
    with pytest.raises(SiopError, match="holds the vectors that the new index is built from"):
        command("index", flat, "--kind", "hnsw", "--index", flat)
    queries.write_text("\n")
    with pytest.raises(SiopError, match="the file of queries is empty"):
        command("index", flat, "--kind", "hnsw", "--queries", queries, "--index", tmp_path / "x")


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages(3))
    for model in ("nobody/no-such-encoder", str(tmp_path / "nowhere")):
        with pytest.raises(SiopError, match=f"cannot load the encoder {model}: "):
            command("encode", "--corpus", corpus, "--model", model)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sentence_transformers", "faiss"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SiopError, match="needs the extra 'retrieval'"):
        Encoder.load("x")
    with pytest.raises(SiopError, match="needs the extra 'retrieval'"):
        load_faiss()


def test_options_and_corpora_that_cannot_be_used_are_named(encoder: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages(3))
    encode = ("encode", "--model", encoder, "--corpus")
    with pytest.raises(SiopError, match=r"--devices cuda:7: this machine has .*cpu"):
        command(*encode, corpus, "--devices", "cuda:7")
    with pytest.raises(SiopError, match="--devices cpu has no effect with --ray"):
        command(*encode, corpus, "--devices", "cpu", "--ray")
    with pytest.raises(SiopError, match="--shard-rows is at least 1, got 0"):
        command(*encode, corpus, "--shard-rows", 0)
    with pytest.raises(SiopError, match=r"cannot read the corpus .*none.jsonl"):
        command(*encode, tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SiopError, match=r"empty.jsonl is empty"):
        command(*encode, tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "contents": "a"}\n{"id": 2}\n')
    with pytest.raises(SiopError, match=r"bad.jsonl, line 2: 'contents'"):
        command(*encode, tmp_path / "bad.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "c.jsonl", "empty.jsonl"]


def test_the_verdict_of_verify_comes_last(flat: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        command("verify", flat)
    assert re.fullmatch(rf"{flat} is whole: \d+ files, \d\.\d{{3}} GB", caplog.messages[-1])
    with pytest.raises(SiopError, match=r"manifest\.json is a file, and an index is a folder; if it is the corpus"):
        command("verify", flat / "manifest.json")


def test_verify_refuses_a_changed_byte(flat: Path, tmp_path: Path) -> None:
    command("verify", flat)
    shard = flat / "vectors" / "00002.f16.npy"
    kept = shard.read_bytes()
    try:
        shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(SiopError, match=r"00002.f16.npy is damaged: its content has changed"):
            command("verify", flat)
    finally:
        shard.write_bytes(kept)
    command("verify", flat)
