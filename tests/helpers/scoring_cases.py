"""Requests that every scoring engine must score like plain full-sequence forward passes, and that plain way itself.

The texts go through a small byte-level BPE tokenizer, which cuts words, multi-byte characters and emoji into pieces as
the tokenizers of real models do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from tiny_models import tiny_causal_lm
from verl.utils.siop.credit.probe import DONE_THINKING
from verl.utils.siop.scorer.engines.base import Probe, RolloutQuery
from verl.utils.siop.siop_process_reward import SiopConfig, SupportRequest, build_reference

VOCAB_SIZE = 512
MAX_MODEL_LEN = 256
TOLERANCE = 1e-4

SENTENCES = (
    "<think>I should search for the tower.</think><search>tallest tower in Tokyo</search>",
    "<think>東京タワーは高い。何メートルですか？</think><search>東京タワー 高さ</search>",
    "The Eiffel Tower in Paris, France is 330 metres (1,083 ft) tall. \n\n\t It opened in 1889.",
    "Первый спутник был запущен в 1957 году.",
    "👩‍🚀🚀 astronauts 👨‍👩‍👧‍👦 café naïve Zürich ¿dónde? 🇫🇷",
    "مرحبا بالعالم — शुभ प्रभात — 안녕하세요",
    "<think>Now there's enough information to answer</think>",
    "Marie Curie (née Skłodowska) won two Nobel Prizes.",
)
PROBE = SiopConfig(siop_reference_prefix=f"\n{DONE_THINKING}", siop_reference_suffix="\n</answer><|im_end|>")
ANSWERS = ("the Eiffel Tower", "東京タワー", "Marie Curie", "👩‍🚀🚀")


@dataclass(frozen=True)
class ScoringCase:
    """One request.

    Attributes:
        name: what is special about it.
        rollouts: the request.
        too_long: indices of the rollouts that get an error because they are over ``MAX_MODEL_LEN``.
    """

    name: str
    rollouts: list[RolloutQuery]
    too_long: frozenset[int] = frozenset()


@lru_cache(maxsize=1)
def bpe_tokenizer():
    """Byte-level BPE with 509 tokens, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 3,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES[::2], PROBE.siop_reference_prefix, PROBE.siop_reference_suffix], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def case_model(seed: int = 0):
    """Random Qwen3 for the cases. It takes longer sequences than ``MAX_MODEL_LEN``, which is the engine's to refuse."""
    return tiny_causal_lm(
        seed,
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2 * MAX_MODEL_LEN,
        initializer_range=0.15,
    )


def save_case_model(path: Path, seed: int = 0) -> Path:
    """Save :func:`case_model` with its tokenizer."""
    case_model(seed).save_pretrained(path)
    bpe_tokenizer().save_pretrained(path)
    return path


def ids(*tokens: int) -> np.ndarray:
    """Token ids as an array."""
    return np.array(tokens, dtype=np.int64)


def query(prompt, response, boundaries, *probes, openings=()) -> RolloutQuery:
    """A rollout from plain lists; a probe is (token ids, start, end)."""
    asked = [Probe(ids(*t), s, e) for t, s, e in probes]
    return RolloutQuery(ids(*prompt), ids(*response), boundaries, asked, [ids(*opening) for opening in openings])


def query_of(request: SupportRequest) -> RolloutQuery:
    """A request as the scorer hands it to an engine."""
    return RolloutQuery(
        prompt_ids=np.array(request.prompt_ids),
        response_ids=np.array(request.response_ids),
        boundaries=request.boundaries,
        probes=[Probe(np.array(r.token_ids), r.start, r.end) for r in request.references],
        openings=[np.array(opening, dtype=np.int64) for opening in request.openings],
    )


def contexts(rollout: RolloutQuery) -> list[np.ndarray]:
    """What stands before the references at each boundary."""
    openings = rollout.openings or [ids()] * len(rollout.boundaries)
    return [
        np.concatenate([rollout.prompt_ids, rollout.response_ids[:boundary], opening])
        for boundary, opening in zip(rollout.boundaries, openings, strict=True)
    ]


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    return bpe_tokenizer()(text, add_special_tokens=False)["input_ids"]


def probe(answer: str) -> tuple[list[int], int, int]:
    """The probe of an answer, as the trainer builds it."""
    reference = build_reference(answer, bpe_tokenizer(), PROBE)
    return reference.token_ids, reference.start, reference.end


def prompt(question: str) -> list[int]:
    """A chat prompt."""
    return encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


def turns(count: int, seed: int) -> tuple[list[int], list[int]]:
    """A response of ``count`` turns of text, and its boundaries: 0 and the end of each turn."""
    rng = np.random.default_rng(seed)
    response: list[int] = []
    bounds = [0]
    for turn in range(count):
        if turn:
            response += encode(f"\n<information>{seed}</information>\n")
        response += encode(SENTENCES[rng.integers(len(SENTENCES))])[: rng.integers(8, 20)]
        bounds.append(len(response))
    return response, bounds


def _group(question: str, size: int, count: int, answers: Sequence[str], seed: int = 0) -> list[RolloutQuery]:
    probes = [probe(answer) for answer in answers]
    return [query(prompt(question), *turns(count, seed + k), *probes) for k in range(size)]


def _raw(rng: np.random.Generator, size: int) -> list[int]:
    return rng.integers(0, VOCAB_SIZE, size).tolist()


def _block_edges() -> list[RolloutQuery]:
    """References that part exactly at, just before and just after the edges of key-value blocks of 16 and 32 tokens."""
    rng = np.random.default_rng(1)
    rollouts = []
    for length in (15, 16, 17, 31, 32, 33, 48, 64):
        stem = _raw(rng, 40)
        # Parting after `at` tokens of the probe, so that the context and the shared part end near a block's edge.
        at = [max(1, edge - length % 32) for edge in (16, 31, 32, 33)]
        probes = [([*stem[:cut], token], 1, cut + 1) for cut, token in itertools.product(at, (5, 6))]
        rollouts.append(query(_raw(rng, length), _raw(rng, 16), [0, 16], *probes))
    return rollouts


def cases() -> Iterator[ScoringCase]:
    """The listed cases; engines are built with ``max_model_len=MAX_MODEL_LEN`` over :func:`case_model`."""
    rng = np.random.default_rng(0)
    for count, references in itertools.product(range(1, 7), range(1, 5)):
        seed = 10 * count + references
        yield ScoringCase(
            f"turns={count} references={references}",
            _group("Where is the tower?", 2, count, ANSWERS[:references], seed),
        )
    yield ScoringCase(
        "texts that are prefixes of each other", _group("Where?", 2, 2, ("Paris", "Paris, France", "Paris, France, EU"))
    )
    stem = _raw(rng, 9)
    nested = [(stem[:3], 1, 3), (stem, 1, 9), (stem[:6], 2, 6), (stem, 4, 7), (stem[:7], 0, 7)]
    yield ScoringCase(
        "token ids that are prefixes of each other", [query(_raw(rng, 20), _raw(rng, 30), [0, 7, 30], *nested)]
    )
    same = ANSWERS[:2]
    yield ScoringCase(
        "identical references in different groups",
        _group("Which tower?", 2, 2, same, 3) + _group("Quelle tour ?", 2, 3, same, 7) + _group("塔は?", 1, 1, same),
    )
    group = _group("Who?", 2, 3, ANSWERS[:3], 5)
    yield ScoringCase("duplicate rollouts", [group[0], group[1], group[0], group[0]])
    yield ScoringCase(
        "a rollout that begins another one",
        [
            query(prompt("Q"), *turns(2, 4), probe("Paris")),
            query(prompt("Q"), turns(2, 4)[0][:9], [0, 9], probe("Paris")),
        ],
    )
    response = _raw(rng, 25)
    yield ScoringCase(
        "references that are the response's own next tokens",
        [query(_raw(rng, 5), response, [0, 3, 25], (response[:8], 0, 8), (response[3:9], 0, 6))],
    )
    yield ScoringCase(
        "a reference of one token",
        [query(_raw(rng, 12), _raw(rng, 20), [0, 20], ([7], 0, 1), ([3, 7], 1, 2), ([3, 8, 9], 1, 2))],
    )
    yield ScoringCase(
        "multi-byte and emoji text",
        _group("東京タワーの高さは？ 🗼👨‍👩‍👧‍👦", 2, 2, ("333メートル", "👩‍🚀", "café 🇫🇷", "مرحبا"), 11),
    )
    text = encode("🦑🏳️‍🌈 東京 🇫🇷")
    yield ScoringCase(
        "boundaries inside a character",
        [query(prompt("🗼?"), text, list(range(len(text) + 1)), probe("👩‍🚀🦑"), (encode("🦑"), 1, 3))],
    )
    yield ScoringCase(
        "boundaries repeated and out of order",
        [query(_raw(rng, 4), _raw(rng, 20), [20, 0, 7, 7, 20], (_raw(rng, 5), 1, 5))],
    )
    yield ScoringCase("an empty response", [query(_raw(rng, 8), [], [0], (_raw(rng, 5), 2, 4))])
    yield ScoringCase(
        "an empty prompt", [query([], _raw(rng, 9), [1, 9], ([3, 4], 0, 2)), query([], [1], [0], ([3, 4, 5], 1, 3))]
    )
    last = VOCAB_SIZE - 1
    yield ScoringCase(
        "first and last token of the vocabulary",
        [query([0, last], [last, 0], [0, 2], ([0, last], 0, 2), ([last], 0, 1))],
    )
    yield ScoringCase("references that part at the edge of a block", _block_edges())
    tail = _raw(rng, 6)
    exact = query(_raw(rng, 30), _raw(rng, MAX_MODEL_LEN - 36), [0, 40, MAX_MODEL_LEN - 36], (tail, 1, 6))
    over = query(_raw(rng, 30), _raw(rng, MAX_MODEL_LEN - 35), [0, MAX_MODEL_LEN - 35], (tail, 1, 6))
    # What follows the reference is not read, so it does not count.
    unread = query(_raw(rng, 30), _raw(rng, MAX_MODEL_LEN - 36), [MAX_MODEL_LEN - 36], ([*tail, 1, 2, 3], 1, 6))
    opened = query(
        _raw(rng, 30), _raw(rng, MAX_MODEL_LEN - 38), [0, MAX_MODEL_LEN - 38], (tail, 1, 6), openings=[[], [7, 8]]
    )
    yield ScoringCase("exactly max_model_len", [exact, unread, opened])
    one_more = query(
        [*opened.prompt_ids, 3], opened.response_ids, opened.boundaries, (tail, 1, 6), openings=[[], [7, 8]]
    )
    yield ScoringCase("an opening that is over max_model_len", [one_more, group[0]], frozenset({0}))
    response, bounds = turns(3, 12)
    opening = encode("\n<|im_start|>assistant\n")
    yield ScoringCase(
        "openings at the ends of turns",
        [
            query(prompt("Who?"), response, bounds, *map(probe, ANSWERS[:2]), openings=[[], opening, opening, []]),
            query(prompt("Who?"), response, bounds, *map(probe, ANSWERS[:2])),
            query([], response, [0, 5], ([3, 4], 0, 2), openings=[opening, []]),
        ],
    )
    yield ScoringCase("one over max_model_len", [over, exact, over, group[0]], frozenset({0, 2}))
    yield ScoringCase("all over max_model_len", [over], frozenset({0}))


CASES = list(cases())

# Few distinct tokens, one of them with several bytes, so that paths share prefixes and their order is tested.
TOKEN = st.sampled_from([0, 1, 2, 258, 300])


@st.composite
def requests(draw) -> list[RolloutQuery]:
    """Small requests whose prompts, responses and references overlap in every way; token ids below 301."""
    prompts = draw(st.lists(st.lists(TOKEN, min_size=1, max_size=5), min_size=1, max_size=2))
    tokens = draw(st.lists(st.lists(TOKEN, min_size=1, max_size=5), min_size=1, max_size=3))
    references = [(reference, 0, len(reference)) for reference in tokens]
    # One that is a prefix of another, and one of a single token.
    references += [(tokens[0][:1], 0, 1), (tokens[0], len(tokens[0]) - 1, len(tokens[0]))]
    rollouts = []
    for _ in range(draw(st.integers(1, 4))):
        response = draw(st.lists(TOKEN, max_size=12))
        count = draw(st.integers(1, 6))
        cuts = draw(st.lists(st.integers(0, len(response)), min_size=count, max_size=count))
        chosen = draw(st.lists(st.sampled_from(references), min_size=1, max_size=4))
        openings = draw(st.just([]) | st.lists(st.lists(TOKEN, max_size=3), min_size=count + 1, max_size=count + 1))
        rollouts.append(query(draw(st.sampled_from(prompts)), response, [0, *cuts], *chosen, openings=openings))
    if draw(st.booleans()):
        rollouts.append(rollouts[0])
    return rollouts


@torch.inference_mode()
def plain_support(model, rollouts: Sequence[RolloutQuery], too_long=frozenset()) -> list[list[list[float]]]:
    """The definition: one full sequence per (boundary, reference); ``[]`` for rollouts in ``too_long``."""
    support = []
    for index, rollout in enumerate(rollouts):
        rows = []
        for context in contexts(rollout) if index not in too_long else ():
            row = []
            for reference in rollout.probes:
                full = torch.from_numpy(np.concatenate([context, reference.token_ids]))
                logprobs = model(input_ids=full[None], use_cache=False).logits[0].log_softmax(-1)
                at = torch.arange(len(context) + reference.start, len(context) + reference.end)
                row.append(float(logprobs[at - 1, full[at]].mean()))
            rows.append(row)
        support.append(rows)
    return support


def flat(support: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """All scores of a request."""
    return [score for rows in support for row in rows for score in row]


def prefixes(paths: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    """Distinct non-empty prefixes of token paths: the nodes of their trie."""
    return {tuple(path[:length]) for path in paths for length in range(1, len(path) + 1)}


def trie_nodes(rollouts: Sequence[RolloutQuery]) -> int:
    """The least number of tokens with which a request can be scored: contexts with their references but the last token
    of each, which is predicted and not read."""
    return len(
        prefixes(
            [
                [*context, *reference.token_ids[: reference.end - 1]]
                for rollout in rollouts
                for context in contexts(rollout)
                for reference in rollout.probes
            ]
        )
    )


def assert_agrees(result, expected: Sequence[Sequence[Sequence[float]]], too_long=frozenset()) -> None:
    """An engine's :class:`SupportResult` has the expected shape, scores and errors."""
    assert set(result.errors) == set(too_long)
    assert [[len(row) for row in rows] for rows in result.support] == [[len(row) for row in rows] for rows in expected]
    np.testing.assert_allclose(flat(result.support), flat(expected), rtol=0, atol=TOLERANCE)
