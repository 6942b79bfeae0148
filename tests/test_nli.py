"""NLI backends: clusters in rounds, label orders, what is cut from texts that are too long, words without a model."""

from __future__ import annotations

import random

import pytest
import torch
from fixtures_scorer import pair_tokenizer, save_classifier, tiny_classifier
from hypothesis import given
from hypothesis import strategies as st
from verl.utils.siop.engines.nli import AnswerGroup, LexicalNli, TransformersNli, cluster_in_rounds
from verl.utils.siop.errors import InvalidRequest, SequenceTooLong, SiopConfigError
from verl.utils.siop.nli_clustering import greedy_clusters

LABELS = ("contradiction", "neutral", "entailment")
MAX_LEN = 96


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def nli():
    model, tokenizer = tiny_classifier(LABELS, max_len=MAX_LEN), pair_tokenizer()
    # Random weights favour one label: centre the logits, so that every label is given to some pairs.
    with torch.inference_mode():
        texts = [f"question {n}? {c}{n}" for n in range(4) for c in "pqrstu"]
        logits = torch.cat([model(**tokenizer(a, b, return_tensors="pt")).logits for a in texts[:8] for b in texts[:8]])
    with torch.no_grad():
        model.classifier.bias -= logits.mean(0)
    return TransformersNli(model, tokenizer, "tiny")


def decode(encoded):
    return pair_tokenizer().decode(encoded["input_ids"])


@given(
    st.lists(
        st.lists(st.sampled_from(["Paris", "paris.", "Rome", "the", "a", "Oslo", "Bern"]), max_size=7), max_size=4
    ),
    st.integers(0, 2**32),
)
def test_rounds_give_the_clusters_of_the_greedy_pass(groups, seed):
    # Any relation between texts: neither symmetric nor transitive.
    table = {}

    def related(a, b):
        if (a, b) not in table:
            table[a, b] = random.Random(f"{seed} {a} {b}").random() < 0.4
        return table[a, b]

    calls = []

    def equivalent(questions):
        calls.append(questions)
        return [related(groups[g][i], groups[g][j]) for g, i, j in questions]

    expected = [greedy_clusters(answers, lambda i, j, a=answers: related(a[i], a[j])) for answers in groups]
    assert cluster_in_rounds(groups, equivalent) == expected
    assert all(calls)
    assert len(calls) <= max((max(ids, default=-1) + 1 for ids in expected), default=0)


def test_lexical_clusters_are_equal_normalised_answers():
    groups = [AnswerGroup("q", ["The Paris", "paris!", "Rome", "Paris"]), AnswerGroup("q", []), AnswerGroup("q", ["x"])]
    assert LexicalNli().cluster(groups) == [[0, 0, 1, 0], [], [0]]


@pytest.mark.parametrize(
    ("premise", "hypothesis", "score"),
    [
        ("The firm was founded by Ada Byron in 1840.", "Ada Byron", 1.0),
        ("The firm was founded by Ada Byron in 1840.", "ada byron, in 1840", 1.0),
        ("The firm was founded by Ada Byron in 1840.", "Byron Ada", 0.0),
        ("Adana is a city", "Ada", 0.0),
        ("anything", "the", 0.0),
        ("", "Ada", 0.0),
    ],
)
def test_lexical_entailment_is_containment_of_whole_words(premise, hypothesis, score):
    assert LexicalNli().entailment([(premise, hypothesis)]) == [score]


def test_entailment_does_not_depend_on_batch_or_order(nli):
    pairs = [("the sky is blue " * n, f"answer {n % 3}") for n in range(1, 9)]
    batched = nli.entailment(pairs + pairs[:2])
    single = [nli.entailment([pair])[0] for pair in pairs]
    assert batched[:8] == pytest.approx(single, abs=1e-5)
    assert batched[8:] == batched[:2]
    assert len({round(score, 4) for score in single}) > 1
    assert nli.entailment([]) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_label_order_comes_from_the_model(nli, order):
    model = tiny_classifier(tuple(LABELS[index] for index in order), max_len=MAX_LEN)
    model.load_state_dict(nli._model.state_dict())
    with torch.no_grad():
        model.classifier.weight.copy_(nli._model.classifier.weight[list(order)])
        model.classifier.bias.copy_(nli._model.classifier.bias[list(order)])
    permuted = TransformersNli(model, pair_tokenizer())
    pairs = [("a b c", "d"), ("x", "yy"), ("long premise here", "z")]
    assert permuted.entailment(pairs) == pytest.approx(nli.entailment(pairs), abs=1e-5)
    groups = [AnswerGroup("who?", list("abcdefgh"), strict) for strict in (True, False)]
    assert permuted.cluster(groups) == nli.cluster(groups)


def test_clusters_are_those_of_the_model_one_pair_at_a_time(nli):
    def label(premise, hypothesis):
        encoded = pair_tokenizer()(premise, hypothesis, return_tensors="pt")
        with torch.inference_mode():
            return LABELS[int(nli._model(**encoded).logits.argmax())]

    seen = set()
    for number, strict in [(n, s) for n in range(4) for s in (True, False)]:
        question, answers = f"question {number}?", [f"{c}{number}" for c in "pqrstu"]

        def equivalent(i, j, question=question, answers=answers, strict=strict):
            a, b = f"{question} {answers[i]}", f"{question} {answers[j]}"
            labels = {label(a, b), label(b, a)}
            return labels == {"entailment"} if strict else "contradiction" not in labels and labels != {"neutral"}

        expected = greedy_clusters(answers, equivalent)
        assert nli.cluster([AnswerGroup(question, answers, strict)]) == [expected]
        seen.add(len(set(expected)))
    assert len(seen) > 1, "every case gave the same number of clusters: this model proves nothing"


def test_question_is_cut_from_its_left_and_answers_stay_whole(nli):
    question = "x" * 3000 + " who founded it?"
    encoded = nli._encode_answers(question, "Ada Byron", "Grace Hopper")
    text = decode(encoded)
    assert len(encoded["input_ids"]) <= MAX_LEN
    assert len(encoded["input_ids"]) >= MAX_LEN - 1, "more was cut than needed"
    assert text.endswith("who founded it? Grace Hopper")
    assert "who founded it? Ada Byron" in text
    assert nli.cluster([AnswerGroup(question, ["Ada Byron", "ada byron"])]) == [[0, 0]]


def test_answer_that_does_not_fit_alone_is_an_error(nli):
    with pytest.raises(SequenceTooLong, match=r"yyy.*tiny takes 96"):
        nli.cluster([AnswerGroup("q", ["y" * 90, "z" * 20])])


def test_premise_is_cut_from_its_right_and_the_hypothesis_never(nli):
    encoded = nli._encode_evidence("BEGIN " + "x" * 3000, "Ada Byron")
    assert len(encoded["input_ids"]) == MAX_LEN
    assert decode(encoded).startswith("BEGIN")
    assert decode(encoded).endswith("Ada Byron")
    with pytest.raises(SequenceTooLong, match="hypothesis"):
        nli.entailment([("p", "h" * 200)])


def test_models_without_the_labels_are_refused(tmp_path):
    with pytest.raises(SiopConfigError, match=r"other.*LABEL_0"):
        TransformersNli(tiny_classifier(("LABEL_0", "LABEL_1")), pair_tokenizer(), "other")
    with pytest.raises(SiopConfigError, match="has 2"):
        TransformersNli(tiny_classifier(("entailment", "ENTAILS")), pair_tokenizer())
    two = TransformersNli(tiny_classifier(("not_entailment", "entailment")), pair_tokenizer())
    assert len(two.entailment([("a", "b")])) == 1
    with pytest.raises(InvalidRequest, match="strict = false"):
        two.cluster([AnswerGroup("q", ["a", "b"], strict=False)])


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path):
    save_classifier(tmp_path / "whole")
    assert TransformersNli.from_pretrained(str(tmp_path / "whole")).entailment([("a", "b")])
    model = tiny_classifier(LABELS)
    model.save_pretrained(
        tmp_path / "headless", state_dict={k: v for k, v in model.state_dict().items() if "classifier" not in k}
    )
    pair_tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(SiopConfigError, match=r"headless.*classifier"):
        TransformersNli.from_pretrained(str(tmp_path / "headless"))
