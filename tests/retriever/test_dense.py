"""A dense index as it is loaded and searched: what it finds, and the damage that it refuses by name."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from corpora import write_corpus
from dense_world import command, edit_manifest, minilm, passages, save_encoder
from verl.utils.siop.errors import SiopError
from verl.utils.siop.retriever import dense
from verl.utils.siop.retriever.encoder import Encoder
from verl.utils.siop.retriever.folder import identify, read_manifest

TOWNS = [
    "The old lighthouse of Varn was built by fishermen in 1802.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "The parliament of Orlia meets in the city of Menta twice a year.",
    "A violin has four strings, which are tuned in fifths.",
    "Volcanoes on the island of Pell erupted in 1911 and destroyed the harbour.",
    "The composer Ilda Fenn wrote nine operas and taught in Menta.",
    "Bakers in Varn make a bread of rye and walnuts for the winter feast.",
    "The river Amo freezes in January and is used as a road.",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text, encoded by MiniLM with E5's prefixes."""
    folder = tmp_path_factory.mktemp("real")
    prefixes = ("--query-prefix", "query: ", "--passage-prefix", "passage: ")
    corpus = write_corpus(folder / "c.jsonl", TOWNS)
    command("encode", "--corpus", corpus, "--model", minilm(), *prefixes, "--shard-rows", 3)
    return folder / "c.jsonl.flat"


@pytest.fixture
def damaged(real: Path, tmp_path: Path) -> Path:
    """A copy of the index and its corpus."""
    shutil.copytree(real, tmp_path / "index")
    shutil.copy(real.with_name("c.jsonl"), tmp_path)
    edit_manifest(tmp_path / "index", lambda m: m["corpus"].update(path=str(tmp_path / "c.jsonl")))
    return tmp_path / "index"


def load(folder: Path, **options: object) -> dense.DenseIndex:
    return dense.load(folder, show_progress=False, **options)[0]  # type: ignore[arg-type]


def test_a_question_finds_the_passage_that_answers_it(real: Path) -> None:
    index = load(real)
    hits = index.search(["which musician wrote operas?", "how do plants make oxygen"], 2)
    assert [found[0][0]["id"] for found in hits] == ["p5", "p1"]
    assert all(found[0][1] > found[1][1] for found in hits)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        index.search(["a"], 0)
    assert index.search([], 3) == []


def test_more_hits_than_documents_are_all_documents(real: Path) -> None:
    hits = load(real).search(["bread"], 100)[0]
    assert sorted(document["id"] for document, _ in hits) == [f"p{i}" for i in range(8)]


def test_approximate_search_returns_no_document_for_what_it_did_not_find(real: Path, tmp_path: Path) -> None:
    for kind in ("hnsw", "ivf_sq8"):
        command("index", real, "--kind", kind, "--index", tmp_path / kind)
        hits = load(tmp_path / kind).search(["bread"], 100)[0]
        assert len({document["id"] for document, _ in hits}) == len(hits) <= 8
        assert hits[0][0]["id"] == "p6"


def test_equal_passages_come_in_corpus_order(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    texts = [*passages(6), *["The same."] * 5]
    command("encode", "--corpus", write_corpus(tmp_path / "c.jsonl", texts), "--model", encoder)
    hits = load(tmp_path / "c.jsonl.flat").search(["The same."], 5)[0]
    assert [document["id"] for document, _ in hits] == [f"p{i}" for i in range(6, 11)]


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("e5-small-v2", ("query: ", "passage: ")),
        ("multilingual-e5-base", ("query: ", "passage: ")),
        ("minilm", ("", "")),
        ("e5-mistral-7b-instruct", ("", "")),  # trained with others
    ],
)
def test_prefixes_of_e5_are_known_by_its_name(tmp_path: Path, name: str, prefixes: tuple[str, str]) -> None:
    identity = Encoder.load(str(save_encoder(tmp_path / name))).identity
    assert (identity.query_prompt, identity.passage_prompt) == prefixes
    identity = Encoder.load(str(tmp_path / name), query_prompt="", passage_prompt="a: ").identity
    assert (identity.query_prompt, identity.passage_prompt) == ("", "a: ")


def test_a_models_own_prompts_hold(tmp_path: Path) -> None:
    path = save_encoder(tmp_path / "e5-base-v2")
    prompts = {"query": "Question: ", "document": "Text: "}
    (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    identity = Encoder.load(str(path)).identity
    assert (identity.query_prompt, identity.passage_prompt) == ("Question: ", "Text: ")


def test_long_texts_are_cut_where_the_limit_says(tmp_path: Path) -> None:
    encoder = Encoder.load(str(save_encoder(tmp_path / "e")), max_query_tokens=8, max_passage_tokens=10_000)
    assert (encoder.identity.max_query_tokens, encoder.identity.max_passage_tokens) == (8, 200)
    one, other = "Town of towns" + "a" * 100, "Town of towns" + "b" * 100
    queries, texts = encoder.encode_queries([one, other]), encoder.encode_passages([one, other])
    np.testing.assert_allclose(queries[0], queries[1], atol=1e-6)
    assert texts[0] @ texts[1] < 0.999
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def sealed(folder: Path) -> None:
    """Digests of what is there now: only what the index finds can be wrong then."""

    def change(manifest: dict) -> None:
        for name in manifest["files"]:
            manifest["files"][name] = identify(folder / name).model_dump()
        corpus = Path(manifest["corpus"]["path"])
        manifest["corpus"].update(identify(corpus).model_dump())

    edit_manifest(folder, change)


def test_a_whole_copy_is_taken_and_a_moved_corpus_too(damaged: Path) -> None:
    moved = damaged.with_name("moved.jsonl")
    damaged.with_name("c.jsonl").rename(moved)
    with pytest.raises(SiopError, match=r"needs .*c.jsonl, which is not there"):
        load(damaged)
    assert len(load(damaged, corpus=moved)) == 8


@pytest.mark.parametrize("name", ["vectors/00001.f16.npy", "offsets.npy", "probes.npy"])
def test_a_damaged_file_is_named(damaged: Path, name: str) -> None:
    path = damaged / name
    kept = path.read_bytes()
    flip_last_byte(path)
    with pytest.raises(SiopError, match=f"{name} is damaged: its content has changed"):
        load(damaged)
    path.write_bytes(kept[:-10])
    with pytest.raises(SiopError, match=rf"{name} is damaged: {len(kept) - 10} bytes, not {len(kept)}"):
        load(damaged)
    path.unlink()
    with pytest.raises(SiopError, match=f"needs .*{name}, which is not there"):
        load(damaged)


def test_a_corpus_that_has_changed_is_named(damaged: Path) -> None:
    corpus = damaged.with_name("c.jsonl")
    stamp = corpus.stat().st_mtime_ns
    corpus.write_text(corpus.read_text().replace("1802", "1803"))
    os.utime(corpus, ns=(stamp, stamp))
    with pytest.raises(SiopError, match=r"c.jsonl has changed since the index in .* was built"):
        load(damaged)


def test_a_corpus_in_another_order_is_noticed_even_with_good_digests(damaged: Path) -> None:
    # The probes' passages, the first, the fifth and the last, stay where they are.
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    write_corpus(damaged.with_name("c.jsonl"), [TOWNS[i] for i in order])
    lines = damaged.with_name("c.jsonl").read_bytes().splitlines(keepends=True)
    np.save(damaged / "offsets.npy", np.cumsum([0, *map(len, lines[:-1])]).astype(np.int64))
    sealed(damaged)
    with pytest.raises(SiopError, match=r"do not belong together: 4 of 8 passages .* \(document 1 finds document 2"):
        load(damaged)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("query_prompt", "passage: ", r"vectors of queries .* another prefix \('passage: ' now\)"),
        ("passage_prompt", "", r"vectors of passages .* another prefix \('' now\)"),
        ("pooling", "cls", "pooling is mean, not cls"),
        ("weights_sha256", "0" * 64, "weights_sha256 is .*, not 0000"),
        ("dimension", 768, "dimension is 384, not 768"),
        ("max_passage_tokens", 512, "max_passage_tokens is 256, not 512"),
    ],
)
def test_an_encoder_that_differs_stops_the_start_by_name(
    damaged: Path, field: str, value: object, message: str
) -> None:
    edit_manifest(damaged, lambda m: m["settings"]["encoder"].update({field: value}))
    with pytest.raises(SiopError, match=message):
        load(damaged)


def test_another_model_in_the_encoders_place_stops_the_start(tmp_path: Path) -> None:
    here = save_encoder(tmp_path / "e")
    command("encode", "--corpus", write_corpus(tmp_path / "c.jsonl", passages(9)), "--model", here)
    folder = tmp_path / "c.jsonl.flat"
    moved = here.rename(tmp_path / "moved")
    with pytest.raises(SiopError, match=f"cannot load the encoder {here}"):
        load(folder)
    assert len(load(folder, model=str(moved))) == 9
    save_encoder(tmp_path / "other", seed=1)
    with pytest.raises(SiopError, match=r"other is not the one that the index was built with .*weights_sha256 is"):
        load(folder, model=str(tmp_path / "other"))
    save_encoder(moved, pooling="cls")  # the same weights
    with pytest.raises(SiopError, match="pooling is cls, not mean"):
        load(folder, model=str(moved))


def test_an_index_that_is_not_dense_is_refused(damaged: Path) -> None:
    edit_manifest(damaged, lambda m: m["settings"].pop("encoder"))
    with pytest.raises(SiopError, match="has no encoder: it is no dense index"):
        load(damaged)


def test_a_faiss_file_of_another_version_is_named(real: Path, tmp_path: Path) -> None:
    command("index", real, "--kind", "hnsw", "--index", tmp_path / "i")
    path = tmp_path / "i" / "index.faiss"
    path.write_bytes(b"IHnX" + path.read_bytes()[4:])
    sealed(tmp_path / "i")
    edit_manifest(tmp_path / "i", lambda m: m["libraries"].update(faiss="9.9"))
    with pytest.raises(SiopError, match=r"faiss .* cannot read .*index.faiss, which faiss 9.9 wrote"):
        load(tmp_path / "i")


def test_the_self_test_counts_an_equal_text(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    command("encode", "--corpus", write_corpus(tmp_path / "c.jsonl", ["One."] * 7), "--model", encoder)
    assert read_manifest(tmp_path / "c.jsonl.flat").self_test
    assert len(load(tmp_path / "c.jsonl.flat")) == 7
