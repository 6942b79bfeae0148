"""Exact search against brute force, and the approximate kinds against exact search."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.utils.siop.retriever.ann import KINDS, AnnVectors
from verl.utils.siop.retriever.ann_build import recall_at, tune
from verl.utils.siop.retriever.corpus import CorpusError
from verl.utils.siop.retriever.folder import IndexFolderError
from verl.utils.siop.retriever.vectors import FlatVectors, open_shards, shard_path, write_shard


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Best first, equal scores in the order of the rows."""
    scores = queries @ vectors.astype(np.float32).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


def unit(count: int, dimension: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@settings(max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5)),
    cuts=st.lists(st.integers(1, 39), max_size=3),
    k=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
    levels=st.integers(1, 3),
)
def test_flat_is_brute_force_with_ties_in_the_order_of_rows(
    shape: tuple[int, int], cuts: list[int], k: int, seed: int, levels: int
) -> None:
    # Small whole numbers: scores are exact, and many are equal, 0.0 and -0.0 among them.
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-levels, levels + 1, shape).astype(np.float16)
    queries = rng.integers(-levels, levels + 1, (3, shape[1])).astype(np.float32)
    shards = [part for part in np.split(vectors, sorted({min(cut, len(vectors)) for cut in cuts})) if len(part)]
    scores, rows = FlatVectors(shards).search(queries, k)
    expected_scores, expected_rows = brute_force(vectors, queries, k)
    assert rows.tolist() == expected_rows.tolist()
    assert scores.tolist() == expected_scores.tolist()


def test_flat_is_brute_force_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.utils.siop.retriever.vectors.CPU_BLOCK_ROWS", 7)
    vectors, queries = unit(300, 16, 0).astype(np.float16), unit(20, 16, 1)
    scores, rows = FlatVectors([vectors[:111], vectors[111:]]).search(queries, 10)
    expected_scores, expected_rows = brute_force(vectors, queries, 10)
    assert (rows == expected_rows).all()
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


@pytest.mark.parametrize("count", [5, 7, 9, 1025, 1027, 1033])
@pytest.mark.parametrize("queries", [1, 4, 33])
def test_equal_vectors_have_equal_scores_wherever_they_are(count: int, queries: int) -> None:
    """The last block of 1,024 rows is short."""
    vectors = unit(count, 384, count).astype(np.float16)
    equal = sorted({0, 1, count // 2, *range(max(2, count - 9), count)})
    vectors[equal] = vectors[0]
    for cut in (count, 3):
        scores, rows = FlatVectors([vectors[:cut], vectors[cut:]][: 1 + (cut < count)]).search(
            unit(queries, 384, 1), count
        )
        for found, order in zip(scores, rows, strict=True):
            places = np.isin(order, equal)
            assert order[places].tolist() == equal and len(set(found[places].tolist())) == 1


def test_shards_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vectors").mkdir()
    paths = [shard_path(tmp_path, i) for i in range(2)]
    for path in paths:
        write_shard(path, unit(5, 8, 0))
    assert [shard.shape for shard in open_shards(paths, 10, 8)] == [(5, 8), (5, 8)]
    with pytest.raises(IndexFolderError, match="has 10 vectors, not 11"):
        open_shards(paths, 11, 8)
    with pytest.raises(IndexFolderError, match=r"00000.*float16\[5, 8\], not float16\[rows, 9\]"):
        open_shards(paths, 10, 9)
    paths[1].write_bytes(paths[1].read_bytes()[:-3])
    with pytest.raises(IndexFolderError, match=r"00001.f16.npy is damaged"):
        open_shards(paths, 10, 8)
    with pytest.raises(CorpusError, match=r"cannot write .*gone"):
        write_shard(tmp_path / "gone" / "00000.f16.npy", unit(5, 8, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_ann_kinds_are_memory_mapped_and_find_what_exact_search_finds(tmp_path: Path, kind: str) -> None:
    vectors = unit(2000, 32, 0).astype(np.float16)
    built = AnnVectors.build(kind, [vectors[:1500], vectors[1500:]], show_progress=False)
    path = tmp_path / f"{kind}.faiss"
    built.save(path)
    ann = AnnVectors.load(path, kind, built.effort, "?")
    assert (ann.count, ann.dimension) == (2000, 32)
    assert str(path) in Path("/proc/self/maps").read_text()
    measured = tune(ann, FlatVectors([vectors]), unit(100, 32, 1), recall=0.9)
    assert measured["recall"]["10"] >= 0.9
    _, rows = ann.search(vectors[:50].astype(np.float32), 1)
    assert (rows[:, 0] == np.arange(50)).mean() > 0.95
    assert (ann.search(vectors[:2].astype(np.float32), 3000)[1] == -1).any()  # more than there are
    # Another file: faiss reads the mapped one ahead, in threads of its own, and a file that is cut while it is mapped
    # ends the process.
    cut = tmp_path / f"cut-{kind}.faiss"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(IndexFolderError, match=f"faiss .* cannot read .*cut-{kind}.faiss, which faiss 9.9 wrote"):
        AnnVectors.load(cut, kind, 1, "9.9")


def test_an_index_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    AnnVectors.build("hnsw", [unit(100, 8, 0)], show_progress=False).save(path)
    with pytest.raises(IndexFolderError, match="holds IndexHNSWFlat, not IndexHNSWSQ"):
        AnnVectors.load(path, "hnsw_sq8", 1, "?")
    with pytest.raises(IndexFolderError, match="kind 'pq'; this version has hnsw"):
        AnnVectors.load(path, "pq", 1, "?")


def test_recall_counts_what_exact_search_has_first() -> None:
    true, found = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[2, 1, 9], [4, -1, -1]])
    assert recall_at(true, found, 1) == 0.5
    assert recall_at(true, found, 2) == 0.75
    assert recall_at(true, found, 3) == 0.5
    assert recall_at(true[:, :2], found, 3) == 0.75  # two documents in all


def test_effort_grows_until_the_recall_is_reached() -> None:
    vectors, queries = unit(4000, 16, 0), unit(50, 16, 1)
    ann = AnnVectors.build("ivf_sq8", [vectors], show_progress=False)
    exact = FlatVectors([vectors])
    few = tune(ann, exact, queries, recall=0.1)["recall"]["10"]
    least = ann.effort
    much = tune(ann, exact, queries, recall=0.97)["recall"]["10"]
    assert few < 0.97 <= much and ann.effort > least
