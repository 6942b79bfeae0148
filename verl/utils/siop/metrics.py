"""Metrics of one step's turn rewards, all under ``siop/``."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np
from verl.utils.siop.baselines import Turns
from verl.utils.siop.siop_process_reward import GroupRewards, Rollout, SiopConfig
from verl.utils.siop.turn_utils import get_assistant_turn_ranges


def group_metrics(
    rewards: GroupRewards, rollouts: Sequence[Rollout], config: SiopConfig, gamma: float = 1.0
) -> dict[str, float]:
    """Metrics of a batch; a key whose mean would run over nothing is left out.

    Args:
        rewards: result of :func:`~verl.utils.siop.siop_process_reward.compute_group_rewards`.
        rollouts: the rollouts it was computed for, in the same order.
        config: the configuration it was computed with.
        gamma: discount of the return-to-go.

    Returns:
        - ``siop/groups``: questions; ``siop/turns/mean``: assistant turns of a rollout
        - ``siop/no_answer``: share of rollouts without an answer
        - ``siop/zero_variance_groups``: share of questions in which all rollouts have the same sum of turn rewards
        - ``siop/clusters_per_group``: mean over questions; ``siop/cluster_entropy``: entropy of the masses in nats,
          mean over questions with an answer (both only where clusters were asked for)
        - ``siop/target_mass``: target of the rollout's cluster, mean over the rollouts that have one
        - ``siop/evidence``: rho of the rollout's cluster, where it was computed
        - ``siop/support_first``, ``siop/support_last``: support at boundary 0 and at the last
        - ``siop/turn_reward/mean``, ``/std``: over all turn rewards, and by turn ``siop/turn_reward/turn_1/mean`` …;
          rollouts without turn rewards (in most modes those without an answer) count in none
        - ``siop/return_to_go/turn_1/mean``, ``/std`` …: what a turn is worth (``siop_return``), over the same rollouts
    """
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.uid, []).append(index)
    values: dict[str, list[float]] = {
        "turns/mean": [len(get_assistant_turn_ranges(rollout.response_mask)) for rollout in rollouts],
        "no_answer": [not answer for answer in rewards.answers],
        "zero_variance_groups": [
            len({math.fsum(rewards.turn_rewards[index]) for index in members}) == 1 for members in groups.values()
        ],
        "target_mass": [mass for mass, r in zip(rewards.target_mass, rewards.turn_rewards, strict=True) if r],
        "evidence": [rho for rho in rewards.evidence if rho is not None],
        "support_first": [support[0] for support in rewards.support if support],
        "support_last": [support[-1] for support in rewards.support if support],
    }
    if not config.siop_use_gold_ref:
        clusters = [[rewards.cluster_ids[index] for index in members] for members in groups.values()]
        counts = [Counter(cluster_id for cluster_id in ids if cluster_id is not None) for ids in clusters]
        values["clusters_per_group"] = [len(count) for count in counts]
        values["cluster_entropy"] = [_entropy(list(count.values())) for count in counts if count]
    metrics = {f"siop/{name}": math.fsum(items) / len(items) for name, items in values.items() if items}
    metrics["siop/groups"] = float(len(groups))
    metrics.update(_mean_and_std("siop/turn_reward", [reward for turns in rewards.turn_rewards for reward in turns]))
    for turn in range(max(map(len, rewards.turn_rewards), default=0)):
        at_turn = [turns[turn] for turns in rewards.turn_rewards if len(turns) > turn]
        metrics.update(_mean_and_std(f"siop/turn_reward/turn_{turn + 1}", at_turn))
    for turn, at_turn in enumerate(_returns_by_turn(rewards.turn_rewards, config, gamma)):
        metrics.update(_mean_and_std(f"siop/return_to_go/turn_{turn + 1}", at_turn))
    return metrics


def _returns_by_turn(turn_rewards: Sequence[Sequence[float]], config: SiopConfig, gamma: float) -> list[list[float]]:
    """The returns of all rollouts that have rewards and reach a turn, for each turn."""
    rows = [list(rewards) for rewards in turn_rewards if rewards]
    if not rows:
        return []
    turns_B = np.array([len(row) for row in rows])
    reached_BT = np.arange(turns_B.max())[None, :] < turns_B[:, None]
    rewards_BT = np.zeros(reached_BT.shape)
    rewards_BT[reached_BT] = [reward for row in rows for reward in row]
    turns = Turns(rewards_BT, reached_BT, np.zeros(len(rows), dtype=int), gamma, scale=False, config=config)
    returns_BT = turns.returns()
    return [returns_BT[reached_BT[:, turn], turn].tolist() for turn in range(reached_BT.shape[1])]


def _entropy(counts: Sequence[int]) -> float:
    """−Σ m·log m of the masses, in nats; 0 (not −0) for one cluster."""
    total = sum(counts)
    return math.fsum(count / total * math.log(total / count) for count in counts)


def _mean_and_std(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, and sample standard deviation if there are two values or more."""
    found = {}
    if values:
        found[f"{name}/mean"] = math.fsum(values) / len(values)
    if len(values) > 1:
        found[f"{name}/std"] = statistics.stdev(values)
    return found
