"""Natural-language inference for the scorer: clusters of answers and entailment of answers by evidence.

Two backends: :class:`TransformersNli`, any sequence classifier with an entailment label, and :class:`LexicalNli`, which
needs no model and compares words.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cachetools import LRUCache
from verl.utils.siop.errors import InvalidRequest, ScorerError, SequenceTooLong, SiopConfigError
from verl.utils.siop.nli_clustering import (
    entailment_index,
    identity_key,
    label_indices,
    loose_equivalent,
    normalize_answer,
    strict_equivalent,
)

logger = logging.getLogger(__name__)

CACHE_ENTRIES = 1 << 16
# Larger batches do not fit the caches of a CPU; a GPU needs them to be busy.
DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# Premise, hypothesis and the label that any trained NLI model gives them.
SELF_TEST = (
    ("Paris is the capital of France.", "The capital of France is Paris.", "entailment"),
    ("Paris is the capital of France.", "Paris is not the capital of France.", "contradiction"),
)


@dataclass(frozen=True)
class AnswerGroup:
    """Answers to one question, to be clustered by meaning."""

    question: str
    answers: Sequence[str]
    strict: bool = True


class NliBackend(Protocol):
    """Entailment and clusters.

    Attributes:
        name: the model, for messages and ``/health``.
        asked: ordered pairs of texts that have been asked for so far.
        computed: those of them that went through a model.
    """

    name: str
    asked: int
    computed: int

    def cluster(self, groups: Sequence[AnswerGroup]) -> list[list[int]]:
        """Cluster ids of each group's answers: those of :func:`nli_clustering.greedy_clusters`."""
        ...

    def entailment(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """P(premise entails hypothesis) of each (premise, hypothesis)."""
        ...


# (group, i, j): does answer j of the group mean the same as answer i, which opened a cluster?
Question = tuple[int, int, int]


def cluster_in_rounds(
    groups: Sequence[Sequence[str]], equivalent: Callable[[list[Question]], list[bool]]
) -> list[list[int]]:
    """Greedy clusters of many groups at once, with few, large calls.

    In each round every unfinished group opens one cluster and asks about all its unassigned answers; the questions of
    all groups go into one call. The ids are those of :func:`nli_clustering.greedy_clusters` group by group: whether an
    answer joins a cluster depends on the answer that opened it alone.

    Args:
        groups: answers of each group.
        equivalent: answers a list of questions; never asked about answers that are identical once normalised.

    Returns:
        Cluster ids of each group's answers, 0, 1, … in order of opening.
    """
    keys = [[identity_key(answer) for answer in answers] for answers in groups]
    ids = [[-1] * len(answers) for answers in groups]
    opened = 0
    while True:
        questions: list[Question] = []
        finished = True
        for g, group_ids in enumerate(ids):
            if -1 not in group_ids:
                continue
            finished = False
            i = group_ids.index(-1)
            group_ids[i] = opened
            for j in range(i + 1, len(group_ids)):
                if group_ids[j] != -1:
                    continue
                if keys[g][j] == keys[g][i]:
                    group_ids[j] = opened
                else:
                    questions.append((g, i, j))
        if finished:
            return ids
        if questions:
            for (g, _, j), same in zip(questions, equivalent(questions), strict=True):
                if same:
                    ids[g][j] = opened
        opened += 1


class LexicalNli:
    """Words instead of a model: equal normalised answers are one cluster; a premise entails a hypothesis (1.0, else
    0.0) if it contains the hypothesis' normalised words as one run. A hypothesis without words is never entailed."""

    name = "lexical"
    asked = 0
    computed = 0

    def cluster(self, groups: Sequence[AnswerGroup]) -> list[list[int]]:
        """See :class:`NliBackend`."""
        return cluster_in_rounds([group.answers for group in groups], lambda questions: [False] * len(questions))

    def entailment(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See :class:`NliBackend`."""
        scores = []
        for premise, hypothesis in pairs:
            words = normalize_answer(hypothesis)
            scores.append(float(bool(words) and f" {words} " in f" {normalize_answer(premise)} "))
        return scores


@dataclass(frozen=True)
class _Input:
    """A pair of texts, one of which may be cut.

    Attributes:
        render: the pair with so many characters of the text that may be cut.
        size: its length.
        what: name of the rest, for the message that it is too long.
    """

    render: Callable[[int], tuple[str, str]]
    size: int
    what: str


def _answers_input(question: str, a: str, b: str) -> _Input:
    def render(kept: int) -> tuple[str, str]:
        context = question[len(question) - kept :] + " "
        return context + a, context + b

    return _Input(render, len(question), f"the answers {_excerpt(a)} and {_excerpt(b)} alone, without their question,")


def _evidence_input(premise: str, hypothesis: str) -> _Input:
    return _Input(
        lambda kept: (premise[:kept], hypothesis), len(premise), f"the hypothesis {_excerpt(hypothesis)} alone"
    )


class TransformersNli:
    """A transformers sequence classifier as NLI model.

    Texts that do not fit the model are cut: the question of an answer from its left, an evidence premise from its
    right. An answer or a hypothesis is never cut.

    Results are kept by the texts they belong to, (question, a, b) or (premise, hypothesis), and the least recently used
    ones are forgotten. The keys are digests, so that an entry takes about 400 bytes however long its texts are.

    Args:
        model: sequence classifier in eval mode on its device.
        tokenizer: its tokenizer.
        name: what messages call the model.
        max_len: longest input in tokens; None for the model's own limit.
        batch_tokens: bound on rows × longest row of a batch; None for 2048 on CPU, 16384 on GPU.
        cache_entries: how many results are kept, 0 for none; the default takes about 25 MB.
        self_test: refuse a model that gets one of ``SELF_TEST`` wrong.

    Raises:
        SiopConfigError: not exactly one label of ``id2label`` starts with ``entail``, or the self-test fails.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str | None = None,
        max_len: int | None = None,
        batch_tokens: int | None = None,
        cache_entries: int = CACHE_ENTRIES,
        self_test: bool = True,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._id2label = model.config.id2label
        try:
            self._entailment = entailment_index(self._id2label)
        except SiopConfigError as error:
            raise SiopConfigError(f"NLI model {self.name}: {error}") from error
        self._max_len = max_len or _longest_input(model.config, tokenizer)
        self._batch_tokens = batch_tokens or DEFAULT_BATCH_TOKENS.get(model.device.type, 16384)
        self._cache: LRUCache[bytes, list[float]] = LRUCache(cache_entries)
        self.asked = self.computed = 0
        if self_test:
            self._self_test()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        self_test: bool = True,
    ) -> TransformersNli:
        """Load a model directory or hub id; ``auto`` is float32 on CPU and float16 on GPU.

        Raises:
            SiopConfigError: the model cannot be loaded, its labels are not those of an NLI model, or it fails the
                self-test.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        started = time.monotonic()
        on_cpu = torch.device(device).type == "cpu"
        torch_dtype = (torch.float32 if on_cpu else torch.float16) if dtype == "auto" else getattr(torch, dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=torch_dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise SiopConfigError(f"cannot load the NLI model {path}: {' '.join(str(error).split())[:300]}") from error
        # transformers fills missing weights at random with no more than a warning: every score would be noise.
        if loading["missing_keys"]:
            raise SiopConfigError(
                f"NLI model {path} is not a trained sequence classifier: it has no weights for "
                f"{', '.join(sorted(loading['missing_keys'])[:3])}"
            )
        backend = cls(model.to(device).eval(), tokenizer, path, self_test=self_test)
        logger.info(
            "NLI model %s: labels %s, at most %d tokens, on %s, loaded in %.1f s",
            path,
            dict(backend._id2label),
            backend._max_len,
            device,
            time.monotonic() - started,
        )
        return backend

    def cluster(self, groups: Sequence[AnswerGroup]) -> list[list[int]]:
        """See :class:`NliBackend`.

        Raises:
            SequenceTooLong: two answers alone, without their question, do not fit the model.
            InvalidRequest: the loose rule is asked of a model without neutral and contradiction labels.
        """
        loose_labels: tuple[int, int, int] | None = None
        if any(not group.strict for group in groups):
            try:
                loose_labels = label_indices(self._id2label)
            except SiopConfigError as error:
                raise InvalidRequest(f"strict = false cannot be used with NLI model {self.name}: {error}") from error

        def equivalent(questions: list[Question]) -> list[bool]:
            texts: list[tuple[str, ...]] = []
            for g, i, j in questions:
                question, answers = groups[g].question, groups[g].answers
                texts += [(question, answers[i], answers[j]), (question, answers[j], answers[i])]
            rows = self._rows(texts, _answers_input)
            labels = [max(range(len(row)), key=row.__getitem__) for row in rows]
            same = []
            for (g, _, _), forward, backward in zip(questions, labels[::2], labels[1::2], strict=True):
                if groups[g].strict:
                    same.append(strict_equivalent(forward, backward, self._entailment))
                else:
                    assert loose_labels is not None
                    same.append(loose_equivalent(forward, backward, loose_labels))
            return same

        return cluster_in_rounds([group.answers for group in groups], equivalent)

    def entailment(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See :class:`NliBackend`.

        Raises:
            SequenceTooLong: a hypothesis alone does not fit the model.
        """
        rows = self._rows([tuple(pair) for pair in pairs], _evidence_input)
        return [row[self._entailment] for row in rows]

    def _rows(self, texts: Sequence[tuple[str, ...]], as_input: Callable[..., _Input]) -> list[list[float]]:
        """Label probabilities of each entry of ``texts``; ``as_input(*entry)`` is the model's input. What is in the
        cache, or was there before in the list, does not reach the model."""
        keys = [_key(entry) for entry in texts]
        known = {key: self._cache[key] for key in keys if key in self._cache}
        missing = {key: entry for key, entry in zip(keys, texts, strict=True) if key not in known}
        rows = self._classify(self._encode([as_input(*entry) for entry in missing.values()]))
        self.asked += len(texts)
        self.computed += len(rows)
        known.update(zip(missing, rows, strict=True))
        if self._cache.maxsize:
            for key in missing:
                self._cache[key] = known[key]
        return [known[key] for key in keys]

    def _self_test(self) -> None:
        for premise, hypothesis, expected in SELF_TEST:
            (row,) = self._classify(self._encode([_evidence_input(premise, hypothesis)]))
            given = row.index(max(row))
            # A model with two labels has another name for what is not entailed.
            if (given == self._entailment) != (expected == "entailment"):
                raise SiopConfigError(
                    f"NLI model {self.name} fails the self-test: it gives label {self._id2label[given]!r} with "
                    f"P(entailment) = {row[self._entailment]:.3f} to {premise!r} -> {hypothesis!r}, which is "
                    f"{expected}. It is not trained for NLI, or the names of its labels are wrong; "
                    "--no-nli-self-test takes it all the same"
                )

    def _encode(self, inputs: Sequence[_Input]) -> list[dict[str, list[int]]]:
        """Token ids of each input, cut no more than it has to be."""
        if not inputs:
            return []
        encoded = self._tokenize([entry.render(entry.size) for entry in inputs])
        if not all(tokens["input_ids"] for tokens in encoded):
            raise InvalidRequest(f"premise and hypothesis are empty, and NLI model {self.name} has no token for that")
        return [
            tokens if len(tokens["input_ids"]) <= self._max_len else self._encode_cut(entry)
            for entry, tokens in zip(inputs, encoded, strict=True)
        ]

    def _encode_cut(self, entry: _Input) -> dict[str, list[int]]:
        """Encode with the most characters of the text that may be cut.

        Characters, not tokens, are cut, so that this holds for every tokenizer.
        """
        low, high = 0, entry.size  # `high` is too long
        (best,) = self._tokenize([entry.render(0)])
        if len(best["input_ids"]) > self._max_len:
            raise SequenceTooLong(
                f"{entry.what} take {len(best['input_ids'])} tokens, NLI model {self.name} takes {self._max_len}"
            )
        while high - low > 1:
            middle = (low + high) // 2
            (tokens,) = self._tokenize([entry.render(middle)])
            if len(tokens["input_ids"]) <= self._max_len:
                low, best = middle, tokens
            else:
                high = middle
        return best

    def _tokenize(self, pairs: list[tuple[str, str]]) -> list[dict[str, list[int]]]:
        # verbose=False: being too long is what is looked for here, not news.
        columns = self._tokenizer(pairs, truncation=False, verbose=False)
        return [{name: column[row] for name, column in columns.items()} for row in range(len(pairs))]

    def _classify(self, encoded: list[dict[str, list[int]]]) -> list[list[float]]:
        """Label probabilities of each input, in batches of similar length."""
        import torch

        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
        rows: list[list[float]] = [[] for _ in encoded]
        start = 0
        with torch.inference_mode():
            while start < len(order):
                longest = len(encoded[order[start]]["input_ids"])
                batch = order[start : start + max(1, self._batch_tokens // longest)]
                start += len(batch)
                # Not return_tensors="pt": that goes through the numbers one by one, in Python.
                padded = self._tokenizer.pad([encoded[index] for index in batch])
                inputs = {name: torch.tensor(column, device=self._model.device) for name, column in padded.items()}
                logits = self._model(**inputs).logits.float()
                if not bool(torch.isfinite(logits).all()):
                    raise ScorerError(f"NLI model {self.name} gave a score that is not finite")
                for index, row in zip(batch, logits.softmax(-1).tolist(), strict=True):
                    rows[index] = row
        return rows


def _longest_input(config: Any, tokenizer: Any) -> int:
    limits = [tokenizer.model_max_length]  # a huge number where the tokenizer states none
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # RoBERTa's positions start after the padding index.
        limits.append(positions - config.pad_token_id - 1 if "roberta" in config.model_type else positions)
    longest = min(limits)
    if longest > 1_000_000:
        raise SiopConfigError(f"neither the NLI model ({config.model_type}) nor its tokenizer states a longest input")
    return int(longest)


def _key(texts: tuple[str, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in (str(len(texts)), *texts):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
