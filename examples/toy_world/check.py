"""Measures a toy model in process: sampled rollouts on a question file, exact match per question template.

    python -m examples.toy_world.check runs/toy            # model/, eval.parquet and corpus.jsonl of a built world

The same rollouts as verl's agent loop with the local search tool, without verl, Ray or services; a few seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast, Qwen3ForCausalLM
from verl.tools.search_common import InvalidQuery, read_query
from verl.utils.siop.retriever.bm25 import Bm25Index

from examples.toy_world.tokenizer import observation_text, prompt_text
from examples.toy_world.warm_start import search_in


@dataclass
class Episode:
    """A sampled rollout: all token ids (prompt first), the assistant turns' texts, tokens of the response."""

    ids: list[int]
    prompt_length: int
    turns: list[str] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The last ``<answer>`` of the last turn, empty if there is none."""
        text = self.turns[-1] if self.turns else ""
        if "</answer>" not in text:
            return ""
        head = text.rsplit("</answer>", 1)[0]
        return head.rsplit("<answer>", 1)[1].strip() if "<answer>" in head else ""


def called_query(turn: str) -> str | None:
    """The query of a turn's search call as the hermes parser would read it, None if there is no call."""
    if "<tool_call>" not in turn:
        return None
    body = turn.split("<tool_call>", 1)[1]
    if "</tool_call>" not in body:
        return None
    try:
        call = json.loads(body.split("</tool_call>", 1)[0])
    except ValueError:
        return None
    arguments = call.get("arguments") if isinstance(call, dict) else None
    if not isinstance(arguments, dict):
        return None
    try:
        return read_query(arguments)
    except InvalidQuery:
        return ""


@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    search: Callable[[str], str],
    *,
    seed: int = 0,
    temperature: float = 1.0,
    max_turns: int = 5,
    max_response_tokens: int = 256,
) -> list[Episode]:
    """One rollout per question, all together, turn by turn. ``temperature`` 0 takes the likeliest token."""
    generator = torch.Generator().manual_seed(seed)
    episodes = []
    for question in questions:
        ids = tokenizer.encode(prompt_text(question))
        episodes.append(Episode(ids, len(ids)))
    active = list(episodes)
    for _ in range(max_turns):
        rooms = [max_response_tokens - (len(e.ids) - e.prompt_length) for e in active]
        new = _next_turn(model, tokenizer, [e.ids for e in active], rooms, temperature, generator)
        going_on = []
        for episode, ids in zip(active, new, strict=True):
            episode.ids += ids
            episode.turns.append(str(tokenizer.decode(ids)))
            query = called_query(episode.turns[-1])
            if query is None or len(episode.turns) == max_turns:
                continue
            result = search(query) if query else "invalid arguments: query is empty"
            observed = tokenizer.encode(observation_text(result))
            if len(episode.ids) - episode.prompt_length + len(observed) < max_response_tokens:
                episode.ids += observed
                going_on.append(episode)
        active = going_on
        if not active:
            break
    return episodes


def _next_turn(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    contexts: list[list[int]],
    rooms: list[int],
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Samples each context's next turn, up to and with the end token; contexts are padded on the left."""
    width = max(len(c) for c in contexts)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(c)) + c for c in contexts])
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, live = DynamicCache(config=model.config), list(range(len(contexts)))
    out: list[list[int]] = [[] for _ in contexts]
    while live:
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if temperature > 0:
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            drawn = logits.argmax(-1)
        keep = []
        for row, (i, token) in enumerate(zip(live, drawn.tolist(), strict=True)):
            out[i].append(token)
            if token != end and len(out[i]) < rooms[i]:
                keep.append(row)
        if len(keep) < len(live):
            rows = torch.tensor(keep, dtype=torch.long)
            live = [live[row] for row in keep]
            cache.batch_select_indices(rows)
            drawn, mask, positions = drawn[rows], mask[rows], positions[rows]
        ids = drawn[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        positions = positions[:, -1:] + 1
    return out


def exact_match(model_dir: Path, data: Path, corpus: Path, *, seed: int, temperature: float) -> pd.DataFrame:
    """One row per question: template, answer, whether it is right, equals the bridge, turns, response tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    documents = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    rows = pd.read_parquet(data)
    episodes = sample(
        model,
        tokenizer,
        [row["extra_info"]["question"] for _, row in rows.iterrows()],
        search_in(Bm25Index.from_documents(documents)),
        seed=seed,
        temperature=temperature,
    )
    return pd.DataFrame(
        [
            {
                "template": row["extra_info"]["template"],
                "answer": episode.answer,
                "em": float(episode.answer in list(row["reward_model"]["ground_truth"]["target"])),
                "bridge": float(episode.answer == row["extra_info"]["bridge"]),
                "answered": float(bool(episode.answer)),
                "turns": len(episode.turns),
                "tokens": len(episode.ids) - episode.prompt_length,
            }
            for (_, row), episode in zip(rows.iterrows(), episodes, strict=True)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, help="folder written by examples.toy_world.build")
    parser.add_argument("--model", type=Path, help="model folder (default: WORLD/model)")
    parser.add_argument("--split", choices=("eval", "train"), default="eval", help="which questions (default: eval)")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed (default: 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 for greedy (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    table = exact_match(
        args.model or args.world / "model",
        args.world / f"{args.split}.parquet",
        args.world / "corpus.jsonl",
        seed=args.seed,
        temperature=args.temperature,
    )
    numbers = ["em", "bridge", "answered", "turns", "tokens"]
    summary = table.groupby("template")[numbers].mean()
    summary.loc["all"] = table[numbers].mean()
    print(summary.round(3).to_string())
    print(f"{len(table)} questions, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
