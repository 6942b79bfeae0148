"""Dense indexes after a stop, damage, a wrong option or a second process: what goes on, and what is refused by name."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from corpora import write_corpus
from dense_world import command, edit_manifest, passages, save_encoder
from verl.utils.siop.errors import SiopError
from verl.utils.siop.retriever import dense
from verl.utils.siop.retriever.encoder import Encoder
from verl.utils.siop.retriever.parts import locked_parts, parts_of
from verl.utils.siop.retriever.vector_job import STATE_FILE, VectorJob


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    """An index of 90 passages in four shards."""
    folder = tmp_path_factory.mktemp("whole")
    command("encode", "--corpus", write_corpus(folder / "c.jsonl", passages(90)), *options(encoder))
    return folder / "c.jsonl.flat"


@pytest.fixture
def flat(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, and of the corpus."""
    shutil.copy(whole.with_name("c.jsonl"), tmp_path)
    shutil.copytree(whole, tmp_path / "c.jsonl.flat")
    edit_manifest(tmp_path / "c.jsonl.flat", lambda fields: fields["corpus"].update(path=str(tmp_path / "c.jsonl")))
    return tmp_path / "c.jsonl.flat"


def options(encoder: Path) -> tuple[object, ...]:
    return "--model", encoder, "--shard-rows", 25


def encode(flat: Path, encoder: Path) -> None:
    command("encode", "--corpus", flat.with_name("c.jsonl"), *options(encoder))


def data_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.npy")}


@pytest.mark.parametrize("name", ["vectors/00001.f16.npy", "vectors/00003.f16.npy", "offsets.npy", "probes.npy"])
@pytest.mark.parametrize("gone", [True, False])
def test_encode_repairs_a_damaged_index(
    flat: Path, encoder: Path, caplog: pytest.LogCaptureFixture, name: str, gone: bool
) -> None:
    before = data_of(flat)
    times = {path: path.stat().st_mtime_ns for path in (flat / "vectors").iterdir() if path != flat / name}
    if gone:
        (flat / name).unlink()
    else:
        (flat / name).write_bytes(before[name][:-1] + b"x")
    with pytest.raises(SiopError):
        dense.load(flat, show_progress=False)
    encode(flat, encoder)
    assert f"is damaged ({name}); what is whole is kept" in caplog.text
    assert data_of(flat) == before and not (flat / STATE_FILE).exists()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(dense.load(flat, show_progress=False)[0]) == 90


def test_a_repair_that_is_stopped_goes_on(flat: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = data_of(flat)
    (flat / "vectors" / "00001.f16.npy").write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(VectorJob, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode(flat, encoder)
    assert not (flat / "manifest.json").exists() and (flat / STATE_FILE).exists()
    encode(flat, encoder)
    assert data_of(flat) == before


def test_a_manifest_that_cannot_be_read_costs_no_vectors(flat: Path, encoder: Path) -> None:
    before = data_of(flat)
    (flat / "manifest.json").write_text("{")
    with pytest.raises(SiopError, match=r"manifest.json is damaged .*, after you have removed .*c\.jsonl\.flat"):
        encode(flat, encoder)
    assert data_of(flat) == before


def left_after(folder: Path, *, offsets: bool, scratch: bool) -> None:
    (folder / "vectors").mkdir(parents=True)
    if offsets:
        (folder / "offsets.npy").write_bytes(b"half")
    if scratch:
        (folder / ".offsets.npy.123").write_bytes(b"half")
        (folder / f".{STATE_FILE}.123").write_bytes(b"half")
        (folder / "vectors" / ".00000.f16.npy.123").write_bytes(b"half")


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("scratch", [True, False])
def test_an_encode_that_was_stopped_at_its_beginning_goes_on(
    whole: Path, encoder: Path, tmp_path: Path, offsets: bool, scratch: bool
) -> None:
    shutil.copy(whole.with_name("c.jsonl"), tmp_path)
    folder = tmp_path / "c.jsonl.flat"
    left_after(folder, offsets=offsets, scratch=scratch)
    encode(folder, encoder)
    assert data_of(folder) == data_of(whole)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "offsets.npy", "probes.npy", "vectors"]


def test_vectors_without_a_state_are_not_taken_over(whole: Path, encoder: Path, tmp_path: Path) -> None:
    shutil.copy(whole.with_name("c.jsonl"), tmp_path)
    folder = tmp_path / "c.jsonl.flat"
    left_after(folder, offsets=True, scratch=False)
    (folder / "vectors" / "00000.f16.npy").write_bytes(b"mine")
    with pytest.raises(SiopError, match="not empty and holds no index; choose another folder"):
        encode(folder, encoder)
    assert (folder / "vectors" / "00000.f16.npy").read_bytes() == b"mine"


def test_a_full_disk_at_the_beginning_is_no_end(whole: Path, encoder: Path, tmp_path: Path) -> None:
    shutil.copy(whole.with_name("c.jsonl"), tmp_path)
    corpus = tmp_path / "c.jsonl"
    code = (
        "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from verl.utils.siop.retriever import build; sys.exit(build.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "encode", "--corpus", str(corpus), *map(str, options(encoder))],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "offsets.npy (848 bytes): File too large" in done.stderr
    encode(tmp_path / "c.jsonl.flat", encoder)
    assert data_of(tmp_path / "c.jsonl.flat") == data_of(whole)


def test_a_second_encode_waits_and_has_nothing_to_do(
    whole: Path, encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shutil.copy(whole.with_name("c.jsonl"), tmp_path)
    folder = tmp_path / "c.jsonl.flat"
    with ThreadPoolExecutor(1) as pool:
        with locked_parts(folder):
            second = pool.submit(encode, folder, encoder)
            while f"another process builds {folder}" not in caplog.text:
                assert not second.done()
                time.sleep(0.01)
            assert not folder.exists()
            shutil.copytree(whole, folder)
        second.result(120)
    assert f"{folder} is whole already" in caplog.text
    assert not parts_of(folder).exists()


def test_a_killed_build_of_an_approximate_index_leaves_nothing_for_ever(flat: Path) -> None:
    target = flat.with_name("hnsw")
    code = (
        "import os, signal, sys; from verl.utils.siop.retriever import ann_build; from dense_world import command\n"
        "ann_build.tune = lambda *_: os.kill(os.getpid(), signal.SIGKILL); command(*sys.argv[1:])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    words = ["index", str(flat), "--kind", "hnsw", "--index", str(target)]
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL and any(parts_of(target).rglob("index.faiss"))
    command(*words)
    assert sorted(path.name for path in flat.parent.iterdir()) == ["c.jsonl", "c.jsonl.flat", "hnsw"]


def test_an_approximate_index_takes_the_place_of_its_own_kind_alone(flat: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(flat, other)
    before = data_of(other)
    with pytest.raises(SiopError, match="other holds an index of kind flat, not hnsw; choose another folder"):
        command("index", flat, "--kind", "hnsw", "--index", other)
    assert data_of(other) == before
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text('{"rows": 7}')
    (data / "train.parquet").write_bytes(b"rows")
    with pytest.raises(SiopError, match=r"data holds a manifest.json that is not of an index; choose another folder"):
        command("index", flat, "--kind", "hnsw", "--index", data)
    assert (data / "train.parquet").read_bytes() == b"rows"


@pytest.mark.parametrize("effort", [0, 1, -5, 10**12, None, 8.0])
@pytest.mark.parametrize("kind", ["hnsw_sq8", "ivf_sq8"])
def test_an_effort_that_no_index_has_is_refused(whole: Path, tmp_path: Path, kind: str, effort: object) -> None:
    folder = whole.with_name(kind)
    if not folder.exists():
        command("index", whole, "--kind", kind, "--index", folder)
    shutil.copytree(folder, tmp_path / "i")
    edit_manifest(tmp_path / "i", lambda fields: fields["settings"].update(effort=effort))
    if kind == "ivf_sq8" and effort == 1:  # there is one list
        assert dense.load(tmp_path / "i", show_progress=False)
        return
    with pytest.raises(SiopError, match=rf"manifest.json: settings.effort is {effort}; {kind} has \d+"):
        dense.load(tmp_path / "i", show_progress=False)


def test_a_manifest_without_its_probes_is_refused(flat: Path) -> None:
    edit_manifest(flat, lambda fields: fields["files"].pop("probes.npy"))
    with pytest.raises(SiopError, match=r"files has other names than kind flat \(probes.npy\)"):
        dense.load(flat, show_progress=False)


def test_an_id_that_is_there_twice_is_named_before_anything_is_encoded(encoder: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages(9))
    corpus.write_text(corpus.read_text().replace('"p7"', '"p2"'))
    with pytest.raises(SiopError, match=r"c\.jsonl, lines 3 and 8: the id 'p2' is there twice; ids must differ"):
        command("encode", "--corpus", corpus, *options(encoder))
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch-size", -1, "--batch-size is at least 1, got -1"),
        ("--batch-size", 0, "--batch-size is at least 1, got 0"),
        ("--max-passage-tokens", 0, "--max-passage-tokens is at least 3, special tokens included, got 0"),
        ("--max-passage-tokens", -3, "--max-passage-tokens is at least 3, special tokens included, got -3"),
        ("--max-query-tokens", 2, "--max-query-tokens is at least 3, special tokens included, got 2"),
    ],
)
def test_options_of_encode_that_cannot_be(encoder: Path, tmp_path: Path, option: str, value: int, message: str) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", passages(3))
    with pytest.raises(SiopError, match=message):
        command("encode", "--corpus", corpus, *options(encoder), option, value)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_the_fewest_tokens_that_are_allowed_can_be_used(encoder: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", ["a", "b"])
    command("encode", "--corpus", corpus, *options(encoder), "--max-passage-tokens", 3, "--max-query-tokens", 3)


@pytest.mark.parametrize("recall", ["nan", "-1", "0", "1.5", "inf"])
def test_a_recall_that_cannot_be_is_refused(flat: Path, recall: str) -> None:
    with pytest.raises(SiopError, match="--recall is above 0 and at most 1, got"):
        command("index", flat, "--kind", "hnsw", f"--recall={recall}")


def test_queries_that_cannot_be_read_are_named(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(b"caf\xe9\n")
    for name in ("q.txt", "none.txt"):
        with pytest.raises(SiopError, match=f"cannot read --queries .*{name}, a text file in UTF-8"):
            command("index", flat, "--kind", "hnsw", "--queries", tmp_path / name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"IxFI" + bytes(20), "24 bytes, and a header alone 45: it was not downloaded or joined whole"),
        (b"", "begins with b'', not with"),
        (b"IxFI" + bytes(41), "header that is not of IndexFlatIP"),
    ],
)
def test_a_file_that_is_shorter_than_its_header_is_named(
    flat: Path, encoder: Path, tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "e5.index").write_bytes(data)
    with pytest.raises(SiopError, match=f"e5.index .*{message}"):
        command("import", "--faiss", tmp_path / "e5.index", "--corpus", flat.with_name("c.jsonl"), *options(encoder))


@pytest.mark.parametrize(
    ("name", "known", "warned"),
    [
        ("e5-base-v2", True, False),
        ("E5-Base-v2", True, False),
        ("intfloat_e5-base-v2", True, False),
        ("models--intfloat--e5-base-v2/snapshots/0123abc", True, False),
        ("models--intfloat--multilingual-e5-large/snapshots/0123abc", True, False),
        ("e5-base-v2/any-model", False, True),
        ("my_e5_tuned", False, True),
        ("e5-mistral-7b-instruct", False, True),
        ("base5-v2", False, False),
    ],
)
def test_e5_is_known_by_its_name_or_warned_about(
    encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, known: bool, warned: bool
) -> None:
    path = tmp_path / "some" / "folder" / name
    shutil.copytree(encoder, path)
    identity = Encoder.load(str(path)).identity
    expected = ("query: ", "passage: ") if known else ("", "")
    assert (identity.query_prompt, identity.passage_prompt) == expected
    assert ("perhaps one of E5" in caplog.text) == warned


def test_a_link_is_what_it_leads_to_and_a_warning_can_be_answered(
    encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(encoder, tmp_path / "e5-small")
    (tmp_path / "model").symlink_to(tmp_path / "e5-small")
    assert Encoder.load(str(tmp_path / "model")).identity.query_prompt == "query: "
    shutil.copytree(encoder, tmp_path / "my-e5")
    Encoder.load(str(tmp_path / "my-e5"), query_prompt="q: ", passage_prompt="")
    assert "perhaps one of E5" not in caplog.text
