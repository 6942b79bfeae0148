"""What BM25 finds: exactly the best by the formula, in whatever way the postings are read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import pytest
from bm25_cases import brute_force, found, random_passages
from bm25s.stopwords import STOPWORDS_EN
from corpora import PASSAGES, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.utils.siop.retriever import bm25_merge, bm25_postings
from verl.utils.siop.retriever.bm25 import Bm25Index, tokenize
from verl.utils.siop.retriever.bm25_words import STOP_WORDS
from verl.utils.siop.retriever.corpus import CorpusError


def index_of(passages: Sequence[str]) -> Bm25Index:
    return Bm25Index.from_documents([{"id": i, "contents": text} for i, text in enumerate(passages)])


def best(index: Bm25Index, query: str, k: int) -> list[tuple[int, float]]:
    return [(document["id"], score) for document, score in index.search([query], k)[0]]


def test_search_ranks_by_shared_words_and_returns_only_matches(tmp_path: Path) -> None:
    index = Bm25Index.build(write_corpus(tmp_path / "c.jsonl", PASSAGES), tmp_path / "index", show_progress=False)
    assert len(index) == len(PASSAGES)
    assert found(index, "FOUNDER kovaco tozex", 3) == ["p0", "p1"]
    assert found(index, "born nila bodson", 1) == ["p2"]
    assert found(index, "zebra", 3) == [] and found(index, "", 3) == [] and found(index, "?! \ud800", 3) == []
    # Stop words are ignored beside other words, and used when there is nothing else.
    assert found(index, "the zebra", 3) == []
    assert len(found(index, "the", 5)) == 3
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        index.search(["nila"], 0)


def test_equal_scores_come_in_corpus_order() -> None:
    index = index_of([f"same words {i}" for i in range(50)])
    assert [i for i, _ in best(index, "same words", 7)] == list(range(7))
    scores = [score for _, score in best(index, "same words 31", 3)]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[1]


def test_documents_keep_their_other_keys_and_text_in_any_script(tmp_path: Path) -> None:
    documents = [{"id": 7, "contents": "Größe 大きさ\n\nline", "title": "x"}, {"id": "b", "contents": ""}]
    path = tmp_path / "c.jsonl"
    path.write_text("\n\n".join(json.dumps(d, ensure_ascii=False) for d in documents), encoding="utf-8")
    index = Bm25Index.build(path, tmp_path / "i", show_progress=False)
    assert index.search(["größe"], 5)[0][0][0] == documents[0]


def test_an_index_needs_a_document_and_no_words() -> None:
    with pytest.raises(CorpusError, match="is empty"):
        index_of([])
    assert best(index_of(["", "?!"]), "word", 3) == []


words = st.sampled_from(["a", "b", "c", "d", "e", "f", "the"])
texts = st.lists(st.lists(words, max_size=12).map(" ".join), min_size=1, max_size=40)


@settings(max_examples=150)
@given(texts, st.lists(words, min_size=1, max_size=6), st.integers(1, 50), st.sampled_from([1, 3, 64]))
def test_results_are_exactly_those_of_the_formula(passages: list[str], query: list[str], k: int, scale: int) -> None:
    asked = [word for word in query if word not in STOP_WORDS] or query
    with pytest.MonkeyPatch.context() as patch:
        # One posting in so many documents is sparse; windows of few documents; words merged by ones and by all.
        patch.setattr(bm25_postings, "_SPARSE", scale)
        patch.setattr(bm25_postings, "_WINDOW", 2 * scale)
        patch.setattr(bm25_merge, "_AT_ONCE", scale)
        assert best(index_of(passages), " ".join(query), k) == brute_force(passages, asked, k)


def test_results_are_those_of_the_formula_on_a_larger_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    passages = random_passages(3000)
    index = index_of(passages)
    queries = [" ".join(text.split()[:n]) for n, text in zip([1, 2, 3, 5, 8, 40] * 5, passages, strict=False)]
    for window, sparse in ((2**17, 64), (100, 64), (100, 2)):
        monkeypatch.setattr(bm25_postings, "_WINDOW", window)
        monkeypatch.setattr(bm25_postings, "_SPARSE", sparse)
        for query in queries:
            expected = brute_force(passages, tokenize(query), 10)
            got = best(index, query, 10)
            assert [i for i, _ in got] == [i for i, _ in expected]
            assert [score for _, score in got] == pytest.approx([score for _, score in expected], rel=1e-12)


def test_results_are_those_of_bm25s() -> None:
    passages = random_passages(400, seed=1)
    index, reference = index_of(passages), bm25s.BM25(k1=1.2, b=0.75, method="lucene", backend="numpy")
    reference.index([tokenize(text) for text in passages], show_progress=False)
    for text in passages[:50]:
        scores = reference.get_scores(tokenize(text)[:6])
        got = best(index, " ".join(tokenize(text)[:6]), 5)
        assert [score for _, score in got] == pytest.approx(sorted(scores, reverse=True)[:5], rel=1e-5)
        assert [score for _, score in got] == pytest.approx([scores[i] for i, _ in got], rel=1e-5)
    assert frozenset(STOPWORDS_EN) == STOP_WORDS


def test_frequent_words_are_only_looked_up_where_rare_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    passages = [f"common usual {'rare' * (i % 500 == 7)}" for i in range(4000)]
    index = index_of(passages)
    read: list[int] = []
    summed = bm25_postings._sum

    def counting(terms: Sequence[Any], *args: Any) -> Any:
        result = summed(terms, *args)
        read.append(len(result.documents))
        return result

    monkeypatch.setattr(bm25_postings, "_sum", counting)
    assert [i for i, _ in best(index, "common usual rare", 3)] == [7, 507, 1007]
    assert read and max(read) == 8  # documents with the rare word
    read.clear()
    best(index, "common usual", 3)
    assert sum(read) >= 4000


def test_k_may_be_larger_than_the_corpus_and_queries_long() -> None:
    index = index_of(PASSAGES)
    assert len(best(index, "nila bodson fevo", 1000)) == 4
    many = " ".join(["bodson"] * 5000 + [f"unknown{i}" for i in range(5000)])
    (first, score), (second, other) = best(index, many, 2)
    assert [(first, score), (second, other)] == brute_force(PASSAGES, tokenize(many), 2)
    # A word that is asked n times counts n times.
    assert score == pytest.approx(5000 * best(index, "bodson", 1)[0][1])
    passages = random_passages(300)
    query = " ".join(passages)[:60_000]
    expected = brute_force(passages, tokenize(query), 3)
    assert [i for i, _ in best(index_of(passages), query, 3)] == [i for i, _ in expected]
