"""What ``benchmarks/gpu_check.py`` measures: one function a stage, each run in a process of its own.

A stage says what it is doing (``report.say``), gives each number as soon as it has it (``report.row``,
``report.number``), so that nothing is lost if it ends early, and names what it could not do (``report.left_out``).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from verl.utils.siop.errors import SiopError
from verl.utils.siop.scorer.engines.base import Probe, RolloutQuery
from verl.utils.siop.scorer.engines.prefix_tree import PrefixTree, build_prefix_tree
from verl.utils.siop.scorer.engines.token_paths import encode_path
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine

from benchmarks.scoring import LARGE_VOCAB_SIZE, full_sequences, make_batch, make_model, model_config, score_one_by_one

GIB = 2**30
# What a forward pass needs beside the weights: a KV cache of 8,500 tokens, logits, activations.
RESERVE_BYTES = 4 * GIB
BLOCK = 128  # of FlexAttention's mask
QWEN3_4B: dict[str, Any] = {
    "vocab_size": LARGE_VOCAB_SIZE,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
DEBERTA_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


class NotEnoughMemory(SiopError, MemoryError):
    """Not even one layer of the model fits."""


class Report(Protocol):
    """Where a stage's findings go."""

    def say(self, text: str) -> None:
        """A line of progress."""

    def number(self, key: str, value: Any) -> None:
        """A finding that is no row of the table."""

    def row(self, what: str, seconds: float, items: int, flop: float, gib: float | None, unit: str = "tokens") -> None:
        """A line of the table: how long so many ``items`` took, with so many floating-point operations and so much
        memory at the most."""

    def left_out(self, text: str) -> None:
        """What this machine or the time was too small for."""


@dataclass(frozen=True)
class Setup:
    """What a stage is given.

    Args:
        dry_run: tiny sizes on a CPU.
        deadline: ``time.time()`` at which the stage will be ended.
    """

    dry_run: bool
    deadline: float

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    @property
    def chunks(self) -> tuple[int, ...]:
        """Tree nodes of a forward pass."""
        return (64, 128) if self.dry_run else (1024, 2048, 4096)

    def batch(self, rollouts: int = 8) -> list[RolloutQuery]:
        """Rollouts of one question: four turns, three references."""
        lengths, vocab_size = ((40, 80), 512) if self.dry_run else ((4000, 8000), LARGE_VOCAB_SIZE)
        return make_batch(
            min(rollouts, 3) if self.dry_run else rollouts, questions=1, response_tokens=lengths, vocab_size=vocab_size
        )

    def seconds_left(self) -> float:
        return self.deadline - time.time()


def timed(setup: Setup, call: Callable[[], Any], rounds: int = 1, warm_up: bool = True) -> tuple[float, Any]:
    """The best wall time of ``call`` in seconds, and what it returned."""
    best, value = float("inf"), call() if warm_up else None
    for _ in range(rounds):
        _synchronize(setup)
        started = time.perf_counter()
        value = call()
        _synchronize(setup)
        best = min(best, time.perf_counter() - started)
    return best, value


def _synchronize(setup: Setup) -> None:
    if not setup.dry_run:
        torch.cuda.synchronize()


def _peak(setup: Setup) -> float | None:
    """Peak memory of the device since the last call, in GiB; none on a CPU."""
    if setup.dry_run:
        return None
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


def random_model(setup: Setup, report: Report, bytes_per_parameter: int) -> Any:
    """Qwen3-4B of random weights in bfloat16, with as many of its layers as fit once a parameter takes so many bytes.

    The weights' scale gives logits a standard deviation of about 2.5, so that they round as those of a trained model.

    Raises:
        NotEnoughMemory: not one layer fits.
    """
    config = model_config(**({**TINY, "vocab_size": 512} if setup.dry_run else QWEN3_4B))
    if not setup.dry_run:
        hidden, width = config.hidden_size, config.head_dim
        heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
        layer = bytes_per_parameter * hidden * (heads * width + 3 * config.intermediate_size)
        free, _ = torch.cuda.mem_get_info()
        fit = (free - RESERVE_BYTES - bytes_per_parameter * config.vocab_size * hidden) // layer
        if fit < 1:
            raise NotEnoughMemory(f"{free / GIB:.1f} GiB of the device's memory are free, too few for one layer")
        if fit < config.num_hidden_layers:
            report.left_out(f"{config.num_hidden_layers - fit} of 36 layers: {free / GIB:.1f} GiB are free")
            config.num_hidden_layers = int(fit)
    report.number("layers", config.num_hidden_layers)
    return make_model(config, setup.device, "bfloat16")


def packed(batch: Sequence[RolloutQuery]) -> PrefixTree:
    """The tree that the engine makes of a batch."""
    paths = [
        encode_path(np.concatenate([rollout.prompt_ids, rollout.response_ids[:boundary], p.token_ids[: p.end - 1]]))
        for rollout in batch
        for boundary in rollout.boundaries
        for p in rollout.probes
    ]
    return build_prefix_tree(paths, [np.empty(0, dtype=np.int64)] * len(paths))


def work(config: Any, tokens: int, pairs: int, rows: int) -> float:
    """Floating-point operations of a forward pass: linear layers, attention of (query, key) ``pairs``, head."""
    width = config.num_attention_heads * config.head_dim
    linear = config.hidden_size * (
        2 * width + 2 * config.num_key_value_heads * config.head_dim + 3 * config.intermediate_size
    )
    layers = config.num_hidden_layers * (2.0 * linear * tokens + 4.0 * width * pairs)
    return layers + 2.0 * config.vocab_size * config.hidden_size * rows


def flat(support: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    return np.array([score for rows in support for row in rows for score in row])


def differences(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of mean log-probabilities."""
    apart = np.abs(one - other)
    return {"max": float(apart.max()), "rms": float(np.sqrt((apart**2).mean()))}


# ------------------------------------------------------------------------------------------------------------ stages
def matmul(setup: Setup, report: Report) -> None:
    """The device, and the rate of a large matrix product in each type: the limit that other rows are a share of."""
    side = 256 if setup.dry_run else 8192
    if not setup.dry_run:
        properties = torch.cuda.get_device_properties(0)
        report.number("device", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
        report.number("free_gib", round(torch.cuda.mem_get_info()[0] / GIB, 1))
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        left, right = (torch.randn(side, side, device=setup.device).to(dtype) for _ in range(2))
        seconds, _ = timed(setup, partial(torch.matmul, left, right), rounds=5)
        flop = 2.0 * side**3
        report.number(f"limit_{name}", flop / seconds)
        report.row(f"matrix product {side}, {name}", seconds, side, flop, _peak(setup), unit="rows")


def speed(setup: Setup, report: Report) -> None:
    """The engine's tree against one full sequence per (boundary, reference), in bfloat16."""
    model = random_model(setup, report, bytes_per_parameter=2)
    config, batch = model.config, setup.batch()
    best, scores = {}, np.empty(0)
    for chunk in setup.chunks:
        report.say(f"tree, {chunk} tokens at a time")
        engine = TransformersEngine(model, chunk_tokens=chunk)
        best[chunk], result = timed(setup, partial(engine.support, batch), rounds=2)
        scores = flat(result.support)
        flop = _tree_work(config, batch)
        report.row(f"tree, bfloat16, chunks of {chunk}", best[chunk], result.computed_tokens, flop, _peak(setup))
    chunk, tree = min(best.items(), key=lambda item: item[1])
    report.number("tree_seconds", tree)
    report.say("full sequences of the first rollout")
    first, _ = timed(setup, partial(_full, model, batch[:1]))
    # Half of what is left: the rest is for lengths that are above the first one's.
    rollouts = max(1, min(len(batch), int(setup.seconds_left() / 2 / first)))
    if rollouts < len(batch):
        report.left_out(f"full sequences of {len(batch) - rollouts} of {len(batch)} rollouts: too slow here")
        engine = TransformersEngine(model, chunk_tokens=chunk)
        tree, _ = timed(setup, partial(engine.support, batch[:rollouts]))
    report.say(f"full sequences of {rollouts} rollouts")
    part = batch[:rollouts]
    seconds, full = timed(setup, partial(_full, model, part), warm_up=False)
    lengths = np.array([len(ids) for ids, _, _ in full_sequences(part)])
    rows = sum(last - first for _, first, last in full_sequences(part))
    flop = work(config, int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum()), rows)
    label = f"full sequences, bfloat16, {rollouts} rollouts"
    report.row(label, seconds, int(lengths.sum()), flop, _peak(setup))
    report.number("speedup", seconds / tree)
    report.number("difference_bfloat16", differences(scores[: len(full)], full))


def precision(setup: Setup, report: Report) -> None:
    """Scores of the same weights in bfloat16 and float32, tree and full sequences, and how much they depend on what
    else is in the request (what ``siop_scorer_noise`` is a floor for)."""
    model, batch = random_model(setup, report, bytes_per_parameter=4), setup.batch(rollouts=2)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for dtype in ("bfloat16", "float32"):
        report.say(f"tree and full sequences of {len(batch)} rollouts, {dtype}")
        model = model.to(getattr(torch, dtype))
        engine = TransformersEngine(model)
        seconds, result = timed(setup, partial(engine.support, batch), warm_up=False)
        flop = _tree_work(model.config, batch)
        report.row(f"tree, {dtype}, 2 rollouts", seconds, result.computed_tokens, flop, _peak(setup))
        report.number(f"noise_{dtype}", noise(engine, _short_texts(model.config.vocab_size)))
        report.number(f"noise_long_{dtype}", noise(engine, batch))
        # The answering turn alone: in float32 all of them would take most of the time there is.
        ends = [RolloutQuery(r.prompt_ids, r.response_ids, r.boundaries[-1:], r.probes) for r in batch]
        tree = np.array([row[-1] for row in result.support]).ravel()
        full = _full(model, ends)
        report.number(f"difference_{dtype}", differences(tree, full))
        found[dtype] = tree, full
    for way, index in (("tree", 0), ("full", 1)):
        report.number(f"difference_of_types_{way}", differences(*(scores[index] for scores in found.values())))


def mask(setup: Setup, report: Report) -> None:
    """Attention of one layer over the whole tree: the engine's dense masks against a block mask of FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    tree = packed(setup.batch())
    size = len(tree) // BLOCK * BLOCK  # the first nodes of a tree are a tree
    config = model_config(**({**TINY, "vocab_size": 512} if setup.dry_run else QWEN3_4B))
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, count, size, config.head_dim, device=setup.device, dtype=torch.bfloat16) for count in heads
    )
    end = torch.from_numpy(tree.end[:size]).to(setup.device)
    flop = 4.0 * heads[0] * config.head_dim * int((tree.depth[:size] + 1).sum())
    fastest = float("inf")
    for chunk in setup.chunks:
        report.say(f"dense masks, {chunk} tokens at a time")
        seconds, dense = timed(setup, partial(dense_attention, query, key, value, end, chunk), rounds=2)
        report.row(f"attention of a layer, dense, {chunk}", seconds, size, flop, _peak(setup))
        fastest = min(fastest, seconds)
    report.number("dense_seconds", fastest)
    report.say("FlexAttention, compiled" if not setup.dry_run else "FlexAttention, not compiled")
    flex = flex_attention if setup.dry_run else torch.compile(flex_attention)
    blocks = block_mask(end)
    report.number("blocks_seen", 1 - float(blocks.sparsity()) / 100)
    with torch.inference_mode():
        attend = partial(flex, query, key, value, block_mask=blocks, enable_gqa=True)
        seconds, given = timed(setup, attend, rounds=2)
    report.row("attention of a layer, FlexAttention", seconds, size, flop, _peak(setup))
    report.number("flex_seconds", seconds)
    report.number("flex_difference", float((given.float() - dense.float()).abs().max()))


def nli(setup: Setup, report: Report) -> None:
    """Pairs of texts a second through a DeBERTa-large of random weights: answers that are compared, and evidence."""
    from transformers import DebertaConfig, DebertaForSequenceClassification
    from verl.utils.siop.scorer.engines.nli_model import TransformersNli

    from benchmarks.nli import LABELS, WORDS, make_tokenizer

    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
        **(TINY if setup.dry_run else DEBERTA_LARGE),
        "vocab_size": 1024 if setup.dry_run else 50265,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "id2label": dict(enumerate(LABELS)),
    }
    torch.manual_seed(0)
    dtype = torch.float32 if setup.dry_run else torch.float16
    model: Any = DebertaForSequenceClassification(DebertaConfig(**settings)).eval().to(setup.device, dtype)
    backend = TransformersNli(model, tokenizer, "random DeBERTa-large", cache_entries=0, self_test=False)
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    few = setup.dry_run
    answers = [(words(20, 30), words(20, 30)) for _ in range(16 if few else 4096)]
    evidence = [(words(300, 400), words(20, 30)) for _ in range(4 if few else 1024)]
    parameters = sum(p.numel() for p in model.deberta.encoder.parameters())
    for what, pairs in (("answers", answers), ("evidence", evidence)):
        tokens = sum(map(len, tokenizer(pairs)["input_ids"]))
        report.say(f"{len(pairs)} pairs of {what}, {tokens} tokens")
        seconds, _ = timed(setup, partial(backend.entailment, pairs))
        label = f"NLI, {what}, {tokens // len(pairs)} tokens a pair"
        flop = 2.0 * parameters * tokens
        report.row(label, seconds, len(pairs), flop, _peak(setup), unit="pairs")


# ----------------------------------------------------------------------------------------------------------- helpers
def _tree_work(config: Any, batch: Sequence[RolloutQuery]) -> float:
    tree = packed(batch)
    rows = sum(last - first for _, first, last in full_sequences(batch))
    return work(config, len(tree), int((tree.depth + 1).sum()), rows)


def _full(model: Any, batch: Sequence[RolloutQuery]) -> np.ndarray:
    return np.array(score_one_by_one(model, full_sequences(batch), rows_only=True))


def noise(engine: TransformersEngine, rollouts: Sequence[RolloutQuery]) -> float:
    """Root mean square difference of a rollout's scores, alone and beside the others: the definition of
    ``siop_scorer_noise``, without a service."""
    alone = flat([engine.support([rollout]).support[0] for rollout in rollouts])
    together = flat(engine.support(rollouts).support)
    return math.sqrt(float(((alone - together) ** 2).mean()))


def _short_texts(vocab_size: int) -> list[RolloutQuery]:
    """As the check at the start of a training: rotations of a question, and one eight times as long beside them."""
    rng = np.random.default_rng(0)
    question, reference = rng.integers(0, vocab_size, 20), Probe(rng.integers(0, vocab_size, 8), 2, 6)
    prompts = [*(np.roll(question, turn) for turn in range(8)), np.tile(question, 8)]
    return [RolloutQuery(prompt, np.empty(0, dtype=np.int64), [0], [reference]) for prompt in prompts]


@torch.inference_mode()
def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, end: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Attention over a packed tree as the engine runs it: chunks, live columns, a dense mask for each.

    Args:
        query: [1, H, N, D].
        key: [1, G, N, D], G a divisor of H.
        value: [1, G, N, D].
        end: [N], of :class:`PrefixTree`.
        chunk: nodes at a time.

    Returns:
        [1, H, N, D].
    """
    groups = query.shape[1] // key.shape[1]
    parts = []
    for start in range(0, len(end), chunk):
        nodes = torch.arange(start, min(start + chunk, len(end)), device=end.device)
        columns = torch.cat([(end[:start] > start).nonzero().flatten(), nodes])
        visible = (columns[None] <= nodes[:, None]) & (nodes[:, None] < end[columns][None])
        bias = torch.zeros(visible.shape, dtype=query.dtype, device=end.device)
        bias.masked_fill_(~visible, torch.finfo(query.dtype).min)
        live = [part.index_select(2, columns).repeat_interleave(groups, 1) for part in (key, value)]
        parts.append(scaled_dot_product_attention(query[:, :, nodes], live[0], live[1], attn_mask=bias[None, None]))
    return torch.cat(parts, 2)


def block_mask(end: torch.Tensor) -> Any:
    """FlexAttention's mask of a packed tree, from ``end`` alone: never N × N.

    Node q sees kv <=> kv <= q < end[kv]. So a block of keys before a block of queries is seen somewhere if its largest
    ``end`` lies beyond the first query, and everywhere if its smallest lies beyond the last one.

    Args:
        end: [N] of :class:`PrefixTree`, N a multiple of ``BLOCK``.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends = end.view(-1, BLOCK)
    first = torch.arange(len(ends), device=end.device) * BLOCK
    before = first[None] < first[:, None]
    full = before & (ends.amin(1)[None] >= first[:, None] + BLOCK)
    seen = (before & (ends.amax(1)[None] > first[:, None])) | (first[None] == first[:, None])

    def listed(which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = which.int().argsort(dim=1, descending=True, stable=True)
        return which.sum(1).int()[None, None], order.int()[None, None]

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < end[key])

    return BlockMask.from_kv_blocks(*listed(seen & ~full), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible)


# In this order; the longest that each may take in seconds.
STAGES: dict[str, tuple[Callable[[Setup, Report], None], float]] = {
    "matmul": (matmul, 60.0),
    "speed": (speed, 200.0),
    "precision": (precision, 120.0),
    "mask": (mask, 90.0),
    "nli": (nli, 60.0),
}
