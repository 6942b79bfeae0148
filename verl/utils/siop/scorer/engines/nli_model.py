"""A transformers sequence classifier as NLI backend: batches of similar length, a cache, and cuts of long texts."""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_left
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from verl.utils.siop.errors import InvalidRequest, ScorerError, SequenceTooLong, SiopConfigError
from verl.utils.siop.nli_clustering import entailment_index, label_indices, loose_equivalent, strict_equivalent
from verl.utils.siop.scorer.engines.loading import as_config_error, dtype_on, log_loaded
from verl.utils.siop.scorer.engines.nli import AnswerGroup, Question, cluster_in_rounds

CACHE_ENTRIES = 1 << 16
# Larger batches do not fit the caches of a CPU; a GPU needs them to be busy.
DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# Premise, hypothesis and the label that any trained NLI model gives them.
SELF_TEST = (
    ("Paris is the capital of France.", "The capital of France is Paris.", "entailment"),
    ("Paris is the capital of France.", "Paris is not the capital of France.", "contradiction"),
)


class _Input(NamedTuple):
    """A pair of texts, one of which may be cut."""

    render: Callable[[int], tuple[str, str]]  # the pair with so many characters of the text that may be cut
    size: int  # its length
    what: str  # the rest, for the message that it is too long


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
        self._cache: MutableMapping[bytes, list[float]] = {}
        if cache_entries:
            from cachetools import LRUCache  # without a cache torch and transformers are all that is needed

            self._cache = LRUCache(cache_entries)
        self._keeps = cache_entries > 0
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
        import transformers

        started = time.monotonic()
        transformers.utils.logging.disable_progress_bar()
        with as_config_error(f"cannot load the NLI model {path}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=dtype_on(device, dtype, on_gpu="float16"),
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        # transformers fills missing weights at random with no more than a warning: every score would be noise.
        if loading["missing_keys"]:
            raise SiopConfigError(
                f"NLI model {path} is not a trained sequence classifier: it has no weights for "
                f"{', '.join(sorted(loading['missing_keys'])[:3])}"
            )
        backend = cls(model.to(device).eval(), tokenizer, path, self_test=self_test)
        log_loaded(
            f"NLI model {path}: labels {dict(backend._id2label)}, at most {backend._max_len} tokens, on {device}",
            started,
        )
        return backend

    def cluster(self, groups: Sequence[AnswerGroup]) -> list[list[int]]:
        """See :class:`NliBackend`.

        Raises:
            SequenceTooLong: two answers alone, without their question, do not fit the model.
            InvalidRequest: the loose rule is asked of a model without neutral and contradiction labels.
        """
        rules: dict[bool, Callable[[int, int], bool]] = {True: partial(strict_equivalent, entailment=self._entailment)}
        if not all(group.strict for group in groups):
            try:
                rules[False] = partial(loose_equivalent, labels=label_indices(self._id2label))
            except SiopConfigError as error:
                raise InvalidRequest(f"strict = false cannot be used with NLI model {self.name}: {error}") from error

        def labels(directions: list[Question]) -> list[int]:
            texts = [(groups[g].question, groups[g].answers[i], groups[g].answers[j]) for g, i, j in directions]
            return [row.index(max(row)) for row in self._rows(texts, _answers_input)]

        def equivalent(questions: list[Question]) -> list[bool]:
            rule = [rules[groups[g].strict] for g, _, _ in questions]
            forward = labels(questions)
            same = [any(rule[n](forward[n], backward) for backward in self._id2label) for n in range(len(questions))]
            # The other direction is asked for only where it decides.
            open_ones = [n for n, maybe in enumerate(same) if maybe]
            reverse = [(g, j, i) for g, i, j in (questions[n] for n in open_ones)]
            for n, backward in zip(open_ones, labels(reverse), strict=True):
                same[n] = rule[n](forward[n], backward)
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
        keys = [hashlib.blake2b(repr(entry).encode(), digest_size=16).digest() for entry in texts]
        known = {key: self._cache[key] for key in keys if key in self._cache}
        missing = {key: entry for key, entry in zip(keys, texts, strict=True) if key not in known}
        rows = self._classify(self._encode([as_input(*entry) for entry in missing.values()]))
        self.asked += len(texts)
        self.computed += len(rows)
        known.update(zip(missing, rows, strict=True))
        if self._keeps:
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

        def encode(kept: int) -> dict[str, list[int]]:
            return self._tokenize([entry.render(kept)])[0]

        def fits(cut: int) -> bool:
            return len(encode(entry.size - cut)["input_ids"]) <= self._max_len

        if not fits(entry.size):
            raise SequenceTooLong(
                f"{entry.what} take {len(encode(0)['input_ids'])} tokens, NLI model {self.name} takes {self._max_len}"
            )
        return encode(entry.size - 1 - bisect_left(range(1, entry.size), True, key=fits))

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


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")
