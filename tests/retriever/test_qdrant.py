"""A dense index whose vectors are in Qdrant: against the database's own in-process mode."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import write_corpus
from dense_world import command, edit_manifest, passages, save_encoder
from qdrant_client import QdrantClient
from scorer_process import free_port
from verl.utils.siop.errors import SiopError
from verl.utils.siop.retriever import dense, qdrant
from verl.utils.siop.retriever.folder import IndexFolderError
from verl.utils.siop.retriever.qdrant import QdrantUnavailable, QdrantVectors, connect, upload
from verl.utils.siop.retriever.qdrant_build import build_qdrant
from verl.utils.siop.retriever.vectors import FlatVectors

DIMENSION = 8


@pytest.fixture
def client() -> QdrantClient:
    return QdrantClient(":memory:")


def shards(*sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = []
    for size in sizes:
        vectors = rng.normal(size=(size, DIMENSION))
        made.append((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    return made


def test_it_finds_what_an_exact_search_finds(client: QdrantClient) -> None:
    parts = shards(30, 25, 3)
    upload(client, "c", parts, "a", show_progress=False)
    vectors = QdrantVectors(client, "c")
    vectors.check(58, DIMENSION, "a")
    queries = shards(5)[0].astype(np.float32)
    scores, rows = vectors.search(queries, 7)
    expected_scores, expected_rows = FlatVectors(parts).search(queries, 7)
    assert rows.tolist() == expected_rows.tolist()
    np.testing.assert_allclose(scores, expected_scores, atol=2e-3)
    _, rows = vectors.search(queries, 60)
    assert rows.shape == (5, 60) and set(rows[0]) == {*range(58), -1}


def test_an_upload_goes_on_where_it_was(client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant, "BATCH", 10)
    parts = shards(30, 25)
    sent: list[int] = []
    upsert = client.upsert

    def failing(collection: str, points: Any, wait: bool) -> None:
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(len(points.ids))
        upsert(collection, points=points, wait=wait)

    monkeypatch.setattr(client, "upsert", failing)
    with pytest.raises(KeyboardInterrupt):
        upload(client, "c", parts, "a", show_progress=False)
    with pytest.raises(SiopError, match=r"c has 30 vectors of 8 numbers, not 55 of 8; upload it again"):
        QdrantVectors(client, "c").check(55, DIMENSION, "a")
    sent.clear()

    def counting(collection: str, points: Any, wait: bool) -> None:
        sent.append(len(points.ids))
        upsert(collection, points=points, wait=wait)

    monkeypatch.setattr(client, "upsert", counting)
    upload(client, "c", parts, "a", show_progress=False)
    assert sent == [10, 10, 5]
    QdrantVectors(client, "c").check(55, DIMENSION, "a")
    _, rows = QdrantVectors(client, "c").search(parts[1][:3].astype(np.float32), 1)
    assert rows.tolist() == [[30], [31], [32]]


def test_a_point_that_was_lost_is_sent_again(client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant, "BATCH", 10)
    upload(client, "c", shards(25), "a", show_progress=False)
    client.delete("c", points_selector=[3])
    upload(client, "c", shards(25), "a", show_progress=False)
    QdrantVectors(client, "c").check(25, DIMENSION, "a")


def test_points_of_unknown_origin_are_refused(client: QdrantClient) -> None:
    from qdrant_client import models

    client.create_collection("c", models.VectorParams(size=DIMENSION, distance=models.Distance.DOT))
    client.upsert("c", models.Batch(ids=[0], vectors=shards(1)[0].tolist()))
    with pytest.raises(SiopError, match=r"c has the vectors of another index \(sha256 None, not a\)"):
        upload(client, "c", shards(5), "a", show_progress=False)


def test_a_collection_of_something_else_is_refused(client: QdrantClient) -> None:
    upload(client, "c", shards(30), "a", show_progress=False)
    with pytest.raises(SiopError, match="c has 30 vectors of 8 numbers, and is not this index's"):
        upload(client, "c", shards(20), "a", show_progress=False)
    # As many, of which the first and the last are the same.
    other = shards(30)
    other[0][1:-1] = other[0][1:-1][::-1].copy()
    with pytest.raises(SiopError, match=r"c has the vectors of another index \(sha256 a, not b\); name another"):
        upload(client, "c", other, "b", show_progress=False)
    with pytest.raises(SiopError, match=r"c has the vectors of another index \(sha256 a, not b\)"):
        QdrantVectors(client, "c").check(30, DIMENSION, "b")
    with pytest.raises(SiopError, match="Qdrant has no collection d"):
        QdrantVectors(client, "d").check(30, DIMENSION, "a")


def test_a_database_that_is_down_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(QdrantUnavailable, match=f"vector database at {url} \\(c\\)"):
        QdrantVectors(connect(url), "c").check(1, 1, "a")


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    corpus = write_corpus(folder / "corpus.jsonl", passages(40))
    command("encode", "--corpus", corpus, "--model", save_encoder(folder / "encoder"))
    return folder / "corpus.jsonl.flat"


def test_a_folder_over_a_collection_is_an_index(
    flat: Path, tmp_path: Path, client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "index"
    manifest = build_qdrant(flat, target, client, "http://db:6333", "c", show_progress=False)
    assert manifest.kind == "qdrant" and manifest.settings["collection"] == "c"
    asked: list[str] = []

    def connecting(url: str) -> QdrantClient:
        asked.append(url)
        return client

    monkeypatch.setattr(dense, "connect", connecting)
    (index,) = dense.load(target, devices=["cpu"], show_progress=False)
    (exact,) = dense.load(flat, devices=["cpu"], show_progress=False)
    queries = ["founded by", "It lies by the Amo", passages(40)[7]]
    for found, expected in zip(index.search(queries, 5), exact.search(queries, 5), strict=True):
        assert [document["id"] for document, _ in found] == [document["id"] for document, _ in expected]
    assert asked == ["http://db:6333"]
    # Another index in its place, another one of the same passages, and a lost vector.
    other = tmp_path / "other.jsonl.flat"
    encoder = save_encoder(tmp_path / "encoder", seed=1)
    command("encode", "--corpus", flat.with_name("corpus.jsonl"), "--model", encoder, "--index", other)
    with pytest.raises(SiopError, match="c has the vectors of another index"):
        build_qdrant(other, tmp_path / "two", client, "http://db:6333", "c", show_progress=False)
    edit_manifest(target, lambda fields: fields["settings"].update(vectors_sha256="0"))
    with pytest.raises(SiopError, match="c has the vectors of another index"):
        dense.load(target, devices=["cpu"], show_progress=False)
    build_qdrant(flat, target, client, "http://db:6333", "c", show_progress=False)
    with pytest.raises(SiopError, match="holds an index of kind flat, not qdrant; choose another folder"):
        build_qdrant(flat, other, client, "http://db:6333", "c", show_progress=False)
    client.delete("c", points_selector=[3])
    with pytest.raises(SiopError, match="has 39 vectors"):
        dense.load(target, devices=["cpu"], show_progress=False)
    with pytest.raises(IndexFolderError, match="only one of kind flat"):
        build_qdrant(target, tmp_path / "again", client, "u", "c", show_progress=False)
