"""What waiting threads cost: the scorer's tree forward, with OpenMP's two ways to wait, quiet and beside busy loops.

    python benchmarks/busy.py [--threads 2] [--busy 2] [--rounds 3]

Threads of OpenMP that wait for each other spin by default, sleep at once with ``OMP_WAIT_POLICY=PASSIVE``, and with
``GOMP_SPINCOUNT`` spin for a moment first, as the launchers and the scorer have it. On a quiet machine that should take
the same time; beside others a spinning thread takes the core of the one that it waits for. All ways run in turns in one
call; a line is the best of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The first is what is there without us, the second what is there with us.
SPINS, MOMENT, SLEEPS, ONE = "spins (unset)", "for a moment", "sleeps (PASSIVE)", "one thread"


def score() -> dict[str, float]:
    """One batch of about 1,100 tree tokens through a random model of the size of SmolLM2-135M; best of two."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine

    from benchmarks.scoring import make_batch

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    engine = TransformersEngine(LlamaForCausalLM(config).eval())
    batch = make_batch(rollouts=2, questions=1, response_tokens=(400, 500))
    found = []
    for _ in range(2):
        cpu, wall = time.process_time(), time.monotonic()
        tokens = engine.support(batch).computed_tokens
        found.append({"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu, "tokens": tokens})
    return min(found, key=lambda run: run["wall"])


def measure(variables: dict[str, str], threads: int) -> dict[str, Any]:
    """:func:`score` in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {"OMP_NUM_THREADS": str(threads)} | variables
    run = subprocess.run([sys.executable, __file__, "--child"], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1, help="busy loops beside it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.threads, args.busy, args.rounds) < 1:
        parser.error("--threads, --busy and --rounds must be at least 1")
    if args.child:
        print(json.dumps(score()))
        return
    sleeps = {"OMP_WAIT_POLICY": "PASSIVE"}
    ways: dict[str, tuple[dict[str, str], int]] = {
        SPINS: ({}, args.threads),
        MOMENT: ({**sleeps, "GOMP_SPINCOUNT": "1000"}, args.threads),
        SLEEPS: (sleeps, args.threads),
        ONE: ({}, 1),
    }
    for loops in (0, args.busy):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
        best: dict[str, dict[str, Any]] = {}
        try:
            for number in range(args.rounds):
                for name, way in ways.items():
                    print(f"  {loops} busy loops, round {number + 1}: {name}", file=sys.stderr, flush=True)
                    found = measure(*way)
                    best[name] = min(best.get(name, found), found, key=lambda run: run["wall"])
        finally:
            for process in others:
                process.kill()
        print(f"{args.threads} threads, {loops} busy loops beside them, {best[SPINS]['tokens']} tokens")
        for name, found in best.items():
            ratio = best[SPINS]["wall"] / found["wall"]
            print(f"  {name:20}{found['wall']:7.2f} s{found['cpu']:8.2f} CPU s   {ratio:.2f} times as fast as unset")


if __name__ == "__main__":
    main()
