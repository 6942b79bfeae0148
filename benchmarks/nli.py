"""Clusters of the answers to many questions: the service's NLI backend against one question at a time.

    python benchmarks/nli.py [--questions 64] [--answers 8] [--threads 1] [--seed 0]

All use the same DeBERTa-v2 of random weights, made here, and give the same clusters. The plain way takes the questions
one by one and asks, for every answer that opens a cluster, about all later unassigned answers in rollout order, padded
to the longest of them. Answers that are identical once normalised are equivalent in every row, as a trained model would
say; in the first row the model is asked nevertheless, in the second it is not.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PreTrainedTokenizerFast
from verl.utils.siop.nli_clustering import identity_key, strict_equivalent
from verl.utils.siop.scorer.engines.nli import AnswerGroup
from verl.utils.siop.scorer.engines.nli_model import TransformersNli

WORDS = [a + b + c for a in "bdklmnprst" for b in ("a", "e", "i", "o", "u", "ai") for c in ("", "n", "rd", "to")]
LABELS = ("contradiction", "entailment", "neutral")


def make_groups(rng: random.Random, questions: int, answers: int) -> list[AnswerGroup]:
    """Questions of 8 to 30 words. The answers of one have one to four meanings, the first one the most frequent, and
    each meaning is written in up to three ways that differ in a word, or only in case and punctuation."""

    def words(low: int, high: int) -> list[str]:
        return rng.choices(WORDS, k=rng.randint(low, high))

    groups = []
    for _ in range(questions):
        forms = []
        for _ in range(rng.randint(1, 4)):
            name = words(1, 4)
            plain, longer = " ".join(name), " ".join([*name, *words(1, 3)])
            forms.append([plain, plain.title() + ".", longer])
        meanings = rng.choices(forms, weights=[2.0**-n for n in range(len(forms))], k=answers)
        texts = [rng.choices(meaning, weights=[7, 2, 1])[0] for meaning in meanings]
        groups.append(AnswerGroup(" ".join(words(8, 30)) + "?", texts))
    return groups


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS, *map(str.capitalize, WORDS), ".", "?"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def make_model(groups: list[AnswerGroup], seed: int) -> tuple[Any, Any]:
    """A classifier of random weights whose labels are about equally frequent for ``groups``, and a word tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(  # some of them the class takes without declaring them
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        relative_attention=True,
        position_buckets=64,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        max_position_embeddings=512,
        type_vocab_size=0,
        initializer_range=0.1,
        id2label=dict(enumerate(LABELS)),
    )
    model: Any = DebertaV2ForSequenceClassification(DebertaV2Config(**settings)).eval()
    pairs = [(f"{group.question} {group.answers[0]}", f"{group.question} {group.answers[-1]}") for group in groups]
    with torch.inference_mode():
        logits = model(**tokenizer(pairs, padding=True, return_tensors="pt")).logits
    with torch.no_grad():
        model.classifier.weight /= logits.std(0, keepdim=True).T
        model.classifier.bias.copy_(-logits.mean(0) / logits.std(0))
        model.classifier.bias[LABELS.index("entailment")] += 1.0  # trained models say so of most paraphrases
    return model, tokenizer


@torch.inference_mode()
def one_group_at_a_time(
    model: Any, tokenizer: Any, groups: list[AnswerGroup], skip_identical: bool
) -> tuple[list[list[int]], int]:
    """Clusters of the plain way, and how many ordered pairs went through the model."""
    entailment = LABELS.index("entailment")
    results, pairs = [], 0
    for group in groups:
        texts, keys = [f"{group.question} {a}" for a in group.answers], [identity_key(a) for a in group.answers]
        ids, opened = [-1] * len(texts), 0
        while -1 in ids:
            opener = ids.index(-1)
            ids[opener] = opened
            later = [j for j in range(opener, len(texts)) if ids[j] == -1]
            same = [j for j in later if keys[j] == keys[opener]]
            asked = [j for j in later if not (skip_identical and j in same)]
            if asked:
                both = [(texts[opener], texts[j]) for j in asked] + [(texts[j], texts[opener]) for j in asked]
                labels = model(**tokenizer(both, padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
                pairs += len(both)
                directions = zip(asked, labels[: len(asked)], labels[len(asked) :], strict=True)
                same += [j for j, forward, backward in directions if strict_equivalent(forward, backward, entailment)]
            for j in same:
                ids[j] = opened
            opened += 1
        results.append(ids)
    return results, pairs


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``call`` returns, its wall time and its CPU time in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--answers", type=int, default=8, help="per question")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="the best time of so many is printed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    groups = make_groups(random.Random(args.seed), args.questions, args.answers)
    model, tokenizer = make_model(groups, args.seed)

    def ours() -> tuple[list[list[int]], int]:
        nli = TransformersNli(model, tokenizer, max_len=512, self_test=False)
        return nli.cluster(groups), nli.computed

    ways: dict[str, Callable[[], tuple[list[list[int]], int]]] = {
        "one question at a time": lambda: one_group_at_a_time(model, tokenizer, groups, skip_identical=False),
        "  identical ones skipped": lambda: one_group_at_a_time(model, tokenizer, groups, skip_identical=True),
        "ours": ours,
    }
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in ways}
    pairs: dict[str, int] = {}
    results: list[list[list[int]]] = []
    for repeat in range(args.repeats + 1):
        for label, way in ways.items():
            (ids, pairs[label]), *seconds = timed(way)
            results.append(ids)
            if repeat:  # the first one warms up
                times[label].append((seconds[0], seconds[1]))
    if any(ids != results[0] for ids in results):
        raise SystemExit("the clusters differ")

    forms = sum(len({identity_key(answer) for answer in group.answers}) for group in groups)
    clusters = sum(len(set(ids)) for ids in results[0])
    print(
        f"{args.questions} questions, {args.answers} answers each, {forms} different once normalised, "
        f"{clusters} clusters; {args.threads} thread(s)"
    )
    print(f"{'':26}{'pairs':>7}{'per cluster':>13}{'wall ms':>10}{'CPU ms':>9}")
    numbers = {}
    for label in ways:
        wall, cpu = (1000 * min(column) for column in zip(*times[label], strict=True))
        numbers[label] = (pairs[label], pairs[label] / clusters, wall, cpu)
        print(f"{label:26}{pairs[label]:7d}{pairs[label] / clusters:13.2f}{wall:10.1f}{cpu:9.1f}")
    *others, last = numbers
    for label in others:
        ratios = [a / b for a, b in zip(numbers[label], numbers[last], strict=True)]
        print(f"{'ratio, ' + label.strip():31}{ratios[0]:.2f}{ratios[1]:13.2f}{ratios[2]:10.2f}{ratios[3]:9.2f}")
    print("the clusters are equal")


if __name__ == "__main__":
    main()
