"""How much faster the ``siop`` estimator and the placement of turn rewards are than a loop over tokens.

    python benchmarks/advantage.py [--rows 256] [--tokens 2048] [--repeat 20]

Both compute the same numbers (checked) for rows of 1 to 6 turns, 8 rollouts of a question.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import verl  # noqa: F401  (registers the estimator)
from verl.trainer.siop.advantage import compute_siop_advantage
from verl.utils.reward_score.siop_reward import place_turn_rewards

K = 8


def make_batch(rows: int, tokens: int) -> tuple[list[list[float]], torch.Tensor, np.ndarray]:
    """Turn rewards, masks and uids; turns and observations share a row's tokens about equally."""
    rng = np.random.default_rng(0)
    mask = torch.zeros(rows, tokens, dtype=torch.int64)
    rewards = []
    for row in range(rows):
        turns = int(rng.integers(1, 7))
        edges = np.sort(rng.choice(np.arange(1, tokens), size=2 * turns, replace=False))
        for start, end in edges.reshape(-1, 2):
            mask[row, start:end] = 1
        rewards.append(rng.normal(size=turns).tolist())
    return rewards, mask, np.array([f"q{row // K}" for row in range(rows)])


def vectorised(rewards: list[list[float]], mask: torch.Tensor, uids: np.ndarray) -> torch.Tensor:
    placed = place_turn_rewards(rewards, mask)
    assert isinstance(placed, torch.Tensor)
    return compute_siop_advantage(placed, mask, index=uids)[0]


def token_loop(rewards: list[list[float]], mask: Any, uids: np.ndarray) -> Any:
    """The same in the form of ``mask``, token by token: a tensor or, which Python reads faster, nested lists."""
    rows, tokens = len(mask), len(mask[0])
    placed = mask.new_zeros(rows, tokens, dtype=torch.float32) if isinstance(mask, torch.Tensor) else zeros(mask)
    for row in range(rows):
        turn = 0
        for t in range(tokens):
            if mask[row][t] == 1 and (t + 1 == tokens or mask[row][t + 1] == 0):
                placed[row][t] = rewards[row][turn]
                turn += 1
    returns: list[list[float]] = []
    for row in range(rows):
        total, by_turn = 0.0, []
        for t in range(tokens - 1, -1, -1):
            total += float(placed[row][t])
            if mask[row][t] == 1 and (t == 0 or mask[row][t - 1] == 0):
                by_turn.append(total)
        returns.append(by_turn[::-1])
    values: list[list[float]] = []
    for row, own in enumerate(returns):
        siblings = [returns[j] for j in range(rows) if j != row and uids[j] == uids[row]]
        values.append(
            [
                value - fmean([other[t] for other in siblings if len(other) > t] or [other[0] for other in siblings])
                for t, value in enumerate(own)
            ]
        )
    scale = stdev([value for row_values in values for value in row_values]) + 1e-6
    advantages = torch.zeros(rows, tokens) if isinstance(mask, torch.Tensor) else zeros(mask)
    for row in range(rows):
        turn = -1
        for t in range(tokens):
            if mask[row][t] == 1:
                turn += int(t == 0 or mask[row][t - 1] == 0)
                advantages[row][t] = values[row][turn] / scale
    return advantages


def zeros(mask: list[list[int]]) -> list[list[float]]:
    return [[0.0] * len(row) for row in mask]


def seconds(function: Callable[..., Any], *args: Any, repeat: int) -> float:
    """Processor seconds of the fastest of ``repeat`` calls, so that other programs on the machine do not count."""
    found = []
    for _ in range(repeat):
        start = time.process_time()
        function(*args)
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="rollouts, a multiple of 8")
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens of a row")
    parser.add_argument("--repeat", type=int, default=20, help="calls of all but the slow loop; the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rewards, mask, uids = make_batch(args.rows, args.tokens)
    as_lists = mask.tolist()
    expected = vectorised(rewards, mask, uids)
    ours = seconds(vectorised, rewards, mask, uids, repeat=args.repeat)
    print(f"{args.rows} rows of {args.tokens} tokens, placement and leave-one-out advantage, one thread")
    print(f"vectorised                        {1e3 * ours:9.1f} ms")
    for name, form, repeat in (("tensors", mask, 1), ("Python lists", as_lists, args.repeat)):
        torch.testing.assert_close(torch.as_tensor(token_loop(rewards, form, uids)), expected, atol=1e-5, rtol=0)
        loop = seconds(token_loop, rewards, form, uids, repeat=repeat)
        print(f"loop over tokens of {name:<14}{1e3 * loop:9.1f} ms   {loop / ours:.0f} times as long")


if __name__ == "__main__":
    main()
