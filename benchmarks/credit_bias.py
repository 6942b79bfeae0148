"""Which baselines give the policy gradient, and which do not: stop/continue chains with known exact gradients.

    python benchmarks/credit_bias.py [--groups 20000] [--plot docs/credit_assignment.svg]

In a chain an agent decides at each turn whether to go on (with probability sigmoid(logit_t)) or to stop; both pay, and
at the last turn it must stop. Prints the gradient of the expected return by each logit: exact, and as the `siop`
estimator's advantages estimate it without division by a standard deviation. The plot needs matplotlib (the extra
`plots`).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import verl  # noqa: F401  (registers the estimator)
from verl.trainer.siop.advantage import compute_siop_advantage

BASELINES = ("leave_one_out", "pooled", "turn_index")


@dataclass(frozen=True)
class Chain:
    """A chain of T turns.

    Args:
        logits: T − 1 logits of going on.
        go: T − 1 rewards of going on.
        stop: T rewards of stopping.
    """

    logits: np.ndarray
    go: np.ndarray
    stop: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, turns: int) -> Chain:
        """Normal logits; rewards of mean 1, so that the mean reward is positive as turn rewards mostly are."""
        return cls(rng.normal(size=turns - 1), rng.normal(1, 1, turns - 1), rng.normal(1, 1, turns))

    def exact_gradient(self) -> np.ndarray:
        """d E[return] / d logit_t = P(reach t)·p_t·(1 − p_t)·(go_t + V_{t+1} − stop_t)."""
        p = 1 / (1 + np.exp(-self.logits))
        value = np.append(np.zeros(len(p)), self.stop[-1])
        for t in range(len(p) - 1, -1, -1):
            value[t] = p[t] * (self.go[t] + value[t + 1]) + (1 - p[t]) * self.stop[t]
        reach = np.append(1.0, np.cumprod(p))[:-1]
        return reach * p * (1 - p) * (self.go + value[1:] - self.stop[:-1])

    def estimated_gradient(self, baseline: str, K: int, groups: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the policy gradient that the estimator's advantages give, and its standard error, by logit.

        Args:
            baseline: ``siop_baseline``.
            K: rollouts of a question.
            groups: questions; their estimates are independent.
            seed: of the sampled decisions.
        """
        rng, turns = np.random.default_rng(seed), len(self.stop)
        p = 1 / (1 + np.exp(-self.logits))
        goes = rng.random((groups * K, turns - 1)) < p
        reached = np.hstack([np.ones((groups * K, 1), bool), np.cumprod(goes, axis=1).astype(bool)])
        stops = reached & ~np.hstack([goes, np.zeros((groups * K, 1), bool)])
        turn_rewards = np.where(stops, self.stop, np.append(self.go, 0.0)) * reached
        # One token per turn and one observation token after it.
        rewards, mask = (np.stack([x, np.zeros_like(x)], axis=2).reshape(len(x), -1) for x in (turn_rewards, reached))
        advantages, _ = compute_siop_advantage(
            torch.from_numpy(rewards),
            torch.from_numpy(mask.astype(np.int64)),
            index=np.repeat(np.arange(groups), K),
            config={"siop_baseline": baseline},
            norm_adv_by_std_in_grpo=False,
        )
        score = np.where(goes, 1 - p, -p) * reached[:, :-1]
        per_group = (advantages.numpy()[:, 0:-2:2] * score).reshape(groups, K, -1).mean(axis=1)
        return per_group.mean(axis=0), per_group.std(axis=0, ddof=1) / math.sqrt(groups)


EXAMPLE = Chain(np.array([0.3, -0.2, 0.5]), np.array([0.4, 0.3, 0.2]), np.array([1.0, 1.1, 1.25, 1.2]))
# Going on is worth it at every turn, and few get far.
LONG = Chain(np.full(7, 1.0), np.full(7, 0.15), np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2]))


def plot(path: Path, titles: list[str], tables: list[dict[str, tuple[np.ndarray, np.ndarray]]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "credit", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(9, 3.2))
    for axis, title, table in zip(axes, titles, tables, strict=True):
        for offset, (name, (values, errors)) in enumerate(table.items()):
            at = np.arange(1, len(values) + 1) + 0.18 * (offset - (len(table) - 1) / 2)
            axis.bar(at, values, 0.16, yerr=2 * errors, label=name)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(title=title, xlabel="turn", ylabel="gradient of going on")
        axis.set_xticks(range(1, len(values) + 1))
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=20_000, help="questions sampled for each estimate")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    args = parser.parse_args()
    titles, tables = [], []
    for name, chain, K in (("four turns", EXAMPLE, 8), ("eight turns", LONG, 8)):
        exact = chain.exact_gradient()
        table = {"exact": (exact, np.zeros_like(exact))}
        table |= {baseline: chain.estimated_gradient(baseline, K, args.groups, seed=0) for baseline in BASELINES}
        print(f"{name}, K={K}, {args.groups} questions: gradient by the logit of going on at turn 1, 2, ...")
        for row, (values, errors) in table.items():
            numbers = " ".join(f"{value:7.3f}" for value in values)
            print(f"  {row:<14} {numbers}" + (f"   (standard error up to {errors.max():.4f})" if errors.any() else ""))
        titles.append(f"{name}, K={K}")
        tables.append(table)
    if args.plot:
        plot(args.plot, titles, tables)


if __name__ == "__main__":
    main()
