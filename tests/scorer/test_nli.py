"""NLI backends: clusters in rounds, label orders, what is cut from texts that are too long, words without a model."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from tiny_models import pair_tokenizer, save_classifier, teach_self_test, tiny_classifier
from verl.utils.siop.errors import InvalidRequest, SequenceTooLong, SiopConfigError
from verl.utils.siop.nli_clustering import (
    greedy_clusters,
    label_indices,
    loose_equivalent,
    normalize_answer,
    strict_equivalent,
)
from verl.utils.siop.scorer.engines.nli import AnswerGroup, LexicalNli, cluster_in_rounds
from verl.utils.siop.scorer.engines.nli_model import TransformersNli, _answers_input, _evidence_input
from verl.utils.siop.scorer.settings import parser, worker_settings
from verl.utils.siop.scorer.workers import NliWorker

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
    return TransformersNli(model, tokenizer, "tiny", self_test=False)


def decode(encoded):
    return pair_tokenizer().decode(encoded["input_ids"])


def greedy_by_definition(answers, related):
    """The algorithm of one group: an unassigned answer opens a cluster and takes its later unassigned equivalents."""
    clusters, opened = [None] * len(answers), 0
    for i, opener in enumerate(answers):
        if clusters[i] is None:
            for j in range(i, len(answers)):
                same = j == i or normalize_answer(answers[j]) == normalize_answer(opener) != ""
                if clusters[j] is None and (same or related(opener, answers[j])):
                    clusters[j] = opened
            opened += 1
    return clusters


def test_rounds_give_the_clusters_of_one_group_at_a_time():
    """Thousands of random relations between texts, most of them neither symmetric nor transitive."""
    words = ["Paris", "paris.", "Rome", "the Rome", "Oslo", "Bern", "Kyiv", "Lima"]
    asymmetric = intransitive = 0
    for seed in range(3000):
        rng = random.Random(seed)
        share = rng.choice([0.05, 0.2, 0.5, 0.8])
        table = {(a, b): rng.random() < share for a in words for b in words}
        groups = [rng.choices(words, k=rng.randrange(9)) for _ in range(rng.randrange(5))]
        rounds = []

        def equivalent(questions, table=table, groups=groups, rounds=rounds):
            rounds.append(questions)
            texts = [(groups[g][i], groups[g][j]) for g, i, j in questions]
            assert all(normalize_answer(a) != normalize_answer(b) for a, b in texts)
            return [table[pair] for pair in texts]

        expected = [greedy_by_definition(answers, lambda a, b, t=table: t[a, b]) for answers in groups]
        assert cluster_in_rounds(groups, equivalent) == expected
        assert all(rounds)
        assert len(rounds) <= max((len(set(ids)) for ids in expected), default=0), "a round per cluster at most"
        asymmetric += any(table[a, b] != table[b, a] for a, b in table)
        intransitive += any(
            table[a, b] and table[b, c] and not table[a, c] for a in words for b in words for c in words
        )
    assert min(asymmetric, intransitive) > 2000


def test_lexical_clusters_are_equal_normalised_answers():
    groups = [AnswerGroup("q", ["The Paris", "paris!", "Rome", "Paris"]), AnswerGroup("q", []), AnswerGroup("q", ["x"])]
    assert LexicalNli().cluster(groups) == [[0, 0, 1, 0], [], [0]]
    signs = AnswerGroup("q", ["-5", "5", "−5", "3.5", "35", "C++", "C#", "“C++”"])
    assert LexicalNli().cluster([signs]) == [[0, 1, 0, 2, 3, 4, 5, 4]]


@pytest.mark.parametrize(
    ("premise", "hypothesis", "score"),
    [
        ("The firm was founded by Ada Byron in 1840.", "Ada Byron", 1.0),
        ("The firm was founded by Ada Byron in 1840.", "ada byron, in 1840", 1.0),
        ("The firm was founded by Ada Byron in 1840.", "Byron Ada", 0.0),
        ("Adana is a city", "Ada", 0.0),
        ("in the tower", "the", 0.0),
        ("a + b", "+", 0.0),
        ("", "Ada", 0.0),
        # Whole words, in the normal form.
        ("Bart lives here", "art", 0.0),
        ("art lives here", "Art", 1.0),
        ("The capital (Paris), in the north", "Paris", 1.0),
        ("“Paris” is the capital", "PARIS!", 1.0),
        ("Paris—the capital", "paris", 1.0),
        ("made by AT&amp;T.", "AT&T", 1.0),
        ("in Zu\u0308rich.", "Zürich", 1.0),
        ("it was −5 degrees", "-5", 1.0),
        ("it was −5 degrees", "5", 0.0),
        ("it was 5 degrees", "-5", 0.0),
        ("3.5 miles", "35", 0.0),
        ("3.5 miles", "5", 0.0),
        ("35 miles", "3.5", 0.0),
        ("it took 3.5.", "3.5", 1.0),
        ("written in C++.", "C++", 1.0),
        ("written in C++", "C#", 0.0),
        ("written in C++", "C", 0.0),
        ("5% of it", "5", 0.0),
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
    permuted = TransformersNli(model, pair_tokenizer(), self_test=False)
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
    (encoded,) = nli._encode([_answers_input(question, "Ada Byron", "Grace Hopper")])
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
    (encoded,) = nli._encode([_evidence_input("BEGIN " + "x" * 3000, "Ada Byron")])
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
    two = TransformersNli(tiny_classifier(("not_entailment", "entailment")), pair_tokenizer(), self_test=False)
    assert len(two.entailment([("a", "b")])) == 1
    with pytest.raises(InvalidRequest, match="strict = false"):
        two.cluster([AnswerGroup("q", ["a", "b"], strict=False)])


def computed(nli, ask):
    """What ``ask(nli)`` returns, the pairs it asked for and those that were computed."""
    before = nli.asked, nli.computed
    result = ask(nli)
    return result, nli.asked - before[0], nli.computed - before[1]


def fresh(nli, **options):
    return TransformersNli(nli._model, pair_tokenizer(), self_test=False, **options)


@pytest.mark.parametrize("strict", [True, False])
def test_the_other_direction_is_asked_only_where_it_decides(nli, monkeypatch, strict):
    nli = fresh(nli)
    labels = label_indices(nli._id2label)
    entailment, neutral, contradiction = labels
    table: dict = {}
    asked: list = []

    def rows(texts, as_input):
        asked.extend(texts)
        return [
            [float(label == table[premise, hypothesis]) for label in nli._id2label] for _, premise, hypothesis in texts
        ]

    monkeypatch.setattr(nli, "_rows", rows)
    words = "abcdef"
    for seed in range(300):
        rng = random.Random(seed)
        table.update({(a, b): rng.choice(labels) for a in words for b in words})
        answers = rng.choices(words, k=6)
        asked.clear()

        def same(i: int, j: int, answers: list = answers) -> bool:
            both = table[answers[i], answers[j]], table[answers[j], answers[i]]
            return strict_equivalent(*both, entailment) if strict else loose_equivalent(*both, labels)

        assert nli.cluster([AnswerGroup("q", answers, strict=strict)]) == [greedy_clusters(answers, same)]
        forward = [pair for _, *pair in asked if answers.index(pair[0]) < answers.index(pair[1])]
        backward = [pair for _, *pair in asked if answers.index(pair[0]) > answers.index(pair[1])]
        hopeless = {neutral, contradiction} if strict else {contradiction}
        assert sorted(backward) == sorted([b, a] for a, b in forward if table[a, b] not in hopeless)


def test_pairs_are_computed_once(nli):
    nli = fresh(nli)
    pairs = [("p", "h"), ("p", "g"), ("p", "h"), ("h", "p")]
    first = computed(nli, lambda nli: nli.entailment(pairs))
    assert first[1:] == (4, 3)
    assert computed(nli, lambda nli: nli.entailment(pairs)) == (first[0], 4, 0)

    groups = [AnswerGroup("q1", ["x", "y", "X.", "y"]), AnswerGroup("q2", ["x", "y"]), AnswerGroup("q1", ["y", "x"])]
    ids, asked, first_time = computed(nli, lambda nli: nli.cluster(groups))
    # The pair (x, y) twice for q1 and once for q2, in one direction or both; identical answers are not asked about.
    assert 4 <= asked <= 8 and 3 <= first_time <= 4
    assert computed(nli, lambda nli: nli.cluster(groups)) == (ids, asked, 0)
    assert ids == [fresh(nli, cache_entries=0).cluster([group])[0] for group in groups]
    # The same texts in another role are another pair.
    assert computed(nli, lambda nli: nli.entailment([("q1", "xy"), ("q1x", "y"), ("x", "y")]))[2] == 3


def test_the_cache_forgets_the_least_recently_used(nli):
    expected = fresh(nli).entailment([("p", str(n)) for n in range(6)])
    nli = fresh(nli, cache_entries=3)
    ask = lambda *numbers: computed(nli, lambda nli: nli.entailment([("p", str(n)) for n in numbers]))  # noqa: E731
    scores, _, count = ask(*range(6))  # more than fit
    assert scores == pytest.approx(expected, abs=1e-5) and count == 6
    assert len(nli._cache) == 3
    assert ask(3)[2] == 0  # 3, 4, 5 are there, 3 now the latest
    assert ask(0)[2] == 1  # takes the place of 4
    assert (ask(3)[2], ask(5)[2], ask(4)[2]) == (0, 0, 1)
    none = fresh(nli, cache_entries=0)
    assert computed(none, lambda nli: nli.entailment([("p", "1")] * 2))[2] == 1
    assert computed(none, lambda nli: nli.entailment([("p", "1")]))[2] == 1


def test_the_self_test_refuses_a_model_that_is_not_trained_for_nli(tmp_path):
    for labels in (LABELS, ("entailment", "not_entailment")):
        model = teach_self_test(tiny_classifier(labels))
        assert TransformersNli(model, pair_tokenizer(), "taught").entailment([("a", "b")])
        with torch.no_grad():
            model.classifier.weight.neg_()
            model.classifier.bias.neg_()
        with pytest.raises(SiopConfigError, match=r"taught fails the self-test.*capital.*--no-nli-self-test"):
            TransformersNli(model, pair_tokenizer(), "taught")
        # Always the same label: right for one of the two.
        for index in range(len(labels)):
            with torch.no_grad():
                model.classifier.weight.zero_()
                model.classifier.bias.zero_()[index] = 1.0
            wrong = "contradiction" if labels[index] == "entailment" else "entailment"
            with pytest.raises(SiopConfigError, match=f"which is {wrong}"):
                TransformersNli(model, pair_tokenizer(), "taught")
    save_classifier(tmp_path, self_test=False)
    with pytest.raises(SiopConfigError, match="self-test"):
        TransformersNli.from_pretrained(str(tmp_path))
    arguments = ["--model", "none", "--num-gpus", "0", "--nli-model", str(tmp_path)]
    for options, taken in ((arguments, False), ([*arguments, "--no-nli-self-test"], True)):
        worker = NliWorker(worker_settings(parser().parse_args(options))[0])
        with contextlib.nullcontext() if taken else pytest.raises(SiopConfigError, match="self-test"):
            assert worker.load() == str(tmp_path)
    result = worker.entailment([("a", "b"), ("a", "b"), ("c", "d")])
    assert (len(result.values), result.asked, result.computed) == (3, 3, 2)
    assert worker.cluster([AnswerGroup("q", ["x", "y"])]).asked in (1, 2)
    assert worker.entailment([("a", "b")]).computed == 0


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path):
    save_classifier(tmp_path / "whole")
    assert TransformersNli.from_pretrained(str(tmp_path / "whole")).entailment([("a", "b")])
    model = tiny_classifier(LABELS)
    model.save_pretrained(
        tmp_path / "headless", state_dict={k: v for k, v in model.state_dict().items() if "classifier" not in k}
    )
    pair_tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(SiopConfigError, match=r"headless.*classifier"):
        TransformersNli.from_pretrained(str(tmp_path / "headless"), self_test=False)
