"""Supervised warm start: a small Qwen3 learns to search and copy by imitating the imperfect agent.

A short phase on an agent that always copies what it sees comes first: with the imperfect agent from the start, copying
does not form in this budget and the model answers at random. That phase asks two-hop questions in every kind of world:
copying is learnt there, the order of the hops after it. A model of an easier world can stand in for it. The text is
masked to weigh the agent's own tokens fully and the rest little.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from verl.tools.search_common import format_hits
from verl.utils.siop.retriever.bm25 import Bm25Index

from examples.toy_world.agent import COPYING, IMPERFECT, PERFECT, Faults, Segment, trajectory
from examples.toy_world.tokenizer import observation_text, prompt_text
from examples.toy_world.world import TWO_HOP, Kind, World, warm_start_world

SEARCH_TOPK = 2
SEARCH_MAX_CHARS = 4000
_BATCH = 32
_OBSERVATION_WEIGHT = 0.15
_MATRIX_LR, _OTHER_LR = 0.02, 3e-3


@dataclass(frozen=True)
class Schedule:
    """Optimiser steps of the two phases, and how many small worlds their text comes from."""

    copying_steps: int = 800
    imperfect_steps: int = 500
    worlds: int = 36

    @property
    def steps(self) -> int:
        return self.copying_steps + self.imperfect_steps


@dataclass(frozen=True)
class Example:
    """Token ids of one episode with the loss weight of each."""

    ids: list[int]
    weights: list[float]


def search_in(index: Bm25Index, *, topk: int = SEARCH_TOPK) -> Callable[[str], str]:
    """The search tool without the service: from query to result text, remembering what was asked."""
    known: dict[str, str] = {}

    def search(query: str) -> str:
        if query not in known:
            (hits,) = index.search([query], topk)
            known[query] = format_hits([document["contents"] for document, _ in hits], SEARCH_MAX_CHARS)
        return known[query]

    return search


def world_index(world: World, seed: str) -> Bm25Index:
    """BM25 over the passages of one world, in random order."""
    documents = [{"id": i, "contents": fact.passage} for i, fact in enumerate(world.facts())]
    random.Random(seed).shuffle(documents)
    return Bm25Index.from_documents(documents)


def encode_episode(
    question: str, segments: Sequence[Segment], encode: Callable[[str], list[int]]
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole episode and which of them the agent wrote, as verl's agent loop puts them together."""
    ids = list(encode(prompt_text(question)))
    from_agent = [False] * len(ids)
    for segment in segments:
        piece = encode(segment.text if segment.from_agent else observation_text(segment.text))
        ids += piece
        from_agent += [segment.from_agent] * len(piece)
    return ids, from_agent


def make_examples(
    tokenizer: PreTrainedTokenizerFast,
    faults: dict[str, Faults],
    *,
    seed: int,
    first_world: int,
    worlds: int,
    count: int,
    kind: Kind = TWO_HOP,
    stale: float = 0.0,
) -> list[Example]:
    """``count`` episodes of an agent with these faults; in every third two-hop world it is perfect.

    The worlds are small and many (``first_world`` onwards), so that only copying can be learnt, not facts.
    """
    rng = random.Random(f"toy world {seed}: episodes from {first_world}")
    remembered: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in remembered:
            remembered[text] = tokenizer.encode(text, add_special_tokens=False)
        return remembered[text]

    examples = []
    for i in range(worlds):
        world = warm_start_world(seed, first_world + i, kind)
        search = search_in(world_index(world, f"toy world {seed}: warm start corpus {first_world + i}"))
        questions = world.questions()
        played = PERFECT if i % 3 == 2 and kind is TWO_HOP else faults
        for _ in range(count * (i + 1) // worlds - count * i // worlds):
            question = rng.choice(questions)
            segments = trajectory(question, world, search, played, rng, stale)
            ids, from_agent = encode_episode(question.text, segments, encode)
            examples.append(Example(ids, [1.0 if own else _OBSERVATION_WEIGHT for own in from_agent]))
        remembered.clear()
    return examples


def batches(examples: list[Example], rng: random.Random, size: int = _BATCH) -> list[list[Example]]:
    """Batches of episodes of about equal length, in random order."""
    rng.shuffle(examples)
    by_length = sorted(examples, key=lambda s: len(s.ids))
    out = [[s for _, s in group] for _, group in groupby(enumerate(by_length), key=lambda pair: pair[0] // size)]
    rng.shuffle(out)
    return out


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of about 0.3M parameters, fp32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.02 if "embed" in name else 0.7 * weight.shape[1] ** -0.5
            torch.nn.init.normal_(weight, 0.0, std)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def warm_start(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    schedule: Schedule | None = None,
    kind: Kind = TWO_HOP,
    stale: float = 0.0,
    early: float = 0.0,
    start: Qwen3ForCausalLM | None = None,
    show_progress: bool = True,
) -> Qwen3ForCausalLM:
    """Trains a new model, or ``start`` further; equal seeds on the same number of threads give the same model.

    ``early``, if not 0, is how often the imperfect agent stops after each hop but the last, whatever the question.
    """
    imperfect = {key: replace(faults, early=early) for key, faults in IMPERFECT.items()} if early else IMPERFECT
    schedule = schedule or Schedule()
    rng = random.Random(f"toy world {seed}: batches")
    model = start or new_model(tokenizer, seed)
    # A model that goes on has seen the worlds of the phases before.
    first_world = schedule.worlds * (2 if stale else 1)
    phases = (
        (COPYING, schedule.copying_steps, 0, TWO_HOP, 0.0),
        (imperfect, schedule.imperfect_steps, first_world, kind, stale),
    )
    plan: list[list[Example]] = []
    for faults, steps, first_world, asked, stale_share in phases:
        examples = make_examples(
            tokenizer,
            faults,
            seed=seed,
            first_world=first_world,
            worlds=min(schedule.worlds, steps),
            count=steps * _BATCH,
            kind=asked,
            stale=stale_share,
        )
        plan += batches(examples, rng)
    # A batch holds episodes of one length. Divided by its own tokens, the loss would count a turn of a short episode
    # several times as much as one of a long episode, and an answer at once would be learnt far too often.
    tokens = None
    if kind is not TWO_HOP:
        tokens = sum(weight == 1.0 for batch in plan for example in batch for weight in example.weights) / len(plan)
    train(model, plan, int(tokenizer.pad_token_id), tokens, show_progress)
    return model.eval()


def train(
    model: Qwen3ForCausalLM, plan: list[list[Example]], pad: int, tokens: float | None, show_progress: bool
) -> None:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.dim() == 2 and "embed" not in name else others).append(weight)
    optimizers = (
        torch.optim.Muon(matrices, lr=_MATRIX_LR, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=_OTHER_LR, betas=(0.9, 0.98), weight_decay=0.0),
    )
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    model.train()
    started, average = time.monotonic(), None
    with tqdm(total=len(plan), desc="warm start", unit=" steps", disable=not show_progress, mininterval=1.0) as bar:
        for step, batch in enumerate(plan):
            # Linear warm-up over 20 steps, linear decay over the last 60 percent.
            factor = min(1.0, (step + 1) / 20) * max(0.03, min(1.0, (len(plan) - step) / (0.6 * len(plan))))
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            loss, agent_nll = _loss(model, batch, pad, tokens)
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            average = agent_nll if average is None else 0.98 * average + 0.02 * agent_nll
            bar.set_postfix_str(f"nll {average:.3f} {time.monotonic() - started:.0f}s", refresh=False)
            bar.update()


def _loss(model: Qwen3ForCausalLM, batch: list[Example], pad: int, tokens: float | None) -> tuple[torch.Tensor, float]:
    """Weighted next-token loss divided by ``tokens`` (the batch's own agent tokens if None), and the agent tokens' mean
    negative log-likelihood alone."""
    width = max(len(s.ids) for s in batch)
    ids = torch.full((len(batch), width), pad)
    weights = torch.zeros(len(batch), width)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        weights[row, : len(sequence.ids)] = torch.tensor(sequence.weights)
    # Padding is on the right and weightless: the causal mask alone keeps it out.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(batch), -1)
    weights = weights[:, 1:]
    own = (weights == 1.0).float()
    divisor = own.sum() if tokens is None else tokens
    return (nll * weights).sum() / divisor, float((nll.detach() * own).sum() / own.sum())
