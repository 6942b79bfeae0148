"""The CPU rollout over the turns of a rollout: with what earlier turns computed, and computing each context anew.

    python benchmarks/rollout.py [--rollouts 64] [--turns 8] [--observation 21] [--action 6] [--threads 2] [--rounds 3]
    python benchmarks/rollout.py --model runs/smollm2 --rollouts 8 --turns 4 --observation 120 --action 30

All rollouts play their turns side by side, as agent loops do; both ways sample the same tokens and run in turns in one
call. Seconds are the best of the rounds. Without ``--model``: an untrained model of the small games' size.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# As the launchers have it: threads that spin take the cores of others.
if not os.environ.get("OMP_WAIT_POLICY"):
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")

import torch
from verl.utils.siop.cpu.prefixes import MAX_BYTES, Prefixes
from verl.utils.siop.cpu.rollout import HfServer

from examples.games.tokenizer import game_tokenizer
from examples.toy_world.warm_start import new_model

OPENING = 23


def make_server(model: Path, tokens: int) -> HfServer:
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.siop.config", version_base=None):
        overrides = [f"actor_rollout_ref.model.path={model}", "data.train_files=x", "data.val_files=x"]
        overrides += [f"data.max_prompt_length={OPENING}", f"data.max_response_length={tokens}", "hardware=cpu"]
        overrides += ["actor_rollout_ref.model.external_lib=null", "actor_rollout_ref.rollout.max_num_seqs=1024"]
        # An action has the length asked for, whatever the untrained model says.
        overrides += ["actor_rollout_ref.rollout.ignore_eos=true", f"actor_rollout_ref.rollout.max_model_len={1 << 20}"]
        config = compose("siop_trainer", overrides=overrides).actor_rollout_ref
    return HfServer(config.rollout, config.model)


async def play(server: HfServer, args: argparse.Namespace) -> list[list[int]]:
    """The contexts of all rollouts at their end."""

    async def one(number: int) -> list[int]:
        words = random.Random(number)
        context = [words.randrange(20, 50) for _ in range(OPENING)]
        for turn in range(args.turns):
            params: dict[str, Any] = {"max_tokens": args.action, "logprobs": True}
            output = await server.generate(context, params, request_id=f"{number} {turn}")
            context = [*context, *output.token_ids, *(words.randrange(20, 50) for _ in range(args.observation))]
        return context

    return await asyncio.gather(*(one(number) for number in range(args.rollouts)))


def measure(server: HfServer, max_bytes: int, args: argparse.Namespace) -> tuple[float, list[list[int]]]:
    server.prefixes = Prefixes(max_bytes)
    server.asked.clear()
    server.decoder, server.arrived, server.model_lock = None, asyncio.Event(), asyncio.Lock()
    start = time.monotonic()
    contexts = asyncio.run(play(server, args))
    return time.monotonic() - start, contexts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a transformers model")
    defaults = (("rollouts", 64), ("turns", 8), ("observation", 21), ("action", 6), ("threads", 2), ("rounds", 3))
    for name, default in defaults:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    args = parser.parse_args()
    if min(getattr(args, name) for name, _ in defaults) < 1:
        parser.error("all numbers must be at least 1")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder)
        if args.model is None:
            tokenizer = game_tokenizer()
            new_model(tokenizer, 0).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        server = make_server(model, args.turns * (args.observation + args.action))
    anew, kept = list[float](), list[float]()
    for _ in range(args.rounds):
        seconds, expected = measure(server, 0, args)
        anew.append(seconds)
        seconds, found = measure(server, MAX_BYTES, args)
        kept.append(seconds)
        same = sum(a == b for a, b in zip(expected, found, strict=True))
    print(f"{args.rollouts} rollouts of {args.turns} turns, {args.threads} threads; the same tokens in {same} rollouts")
    print(f"  each context anew  {min(anew):7.2f} s")
    print(f"  what is new        {min(kept):7.2f} s   {min(anew) / min(kept):.2f} times as fast")


if __name__ == "__main__":
    main()
