"""Metrics of one step's turn rewards, all under ``siop/``."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from verl.utils.siop.credit.answers import exact_match
from verl.utils.siop.credit.baselines import NOISE_STDS, STD_FLOOR, Turns, signal
from verl.utils.siop.credit.config import SiopConfig
from verl.utils.siop.credit.registry import BASELINES
from verl.utils.siop.credit.rollouts import GroupRewards, Rollout
from verl.utils.siop.turn_utils import get_assistant_turn_ranges


def group_metrics(
    rewards: GroupRewards,
    rollouts: Sequence[Rollout],
    config: SiopConfig,
    gamma: float = 1.0,
    labels: Sequence[Sequence[str]] | None = None,
    scale: bool = True,
) -> dict[str, float]:
    """Metrics of a batch; a key whose mean would run over nothing is left out.

    Args:
        rewards: result of :func:`~verl.utils.siop.siop_process_reward.compute_group_rewards`.
        rollouts: the rollouts it was computed for, in the same order.
        config: the configuration it was computed with.
        gamma: discount of the return-to-go.
        labels: the gold answers of each rollout's question, empty where there are none; None if nobody looked.
        scale: whether the update divides advantages by a standard deviation (``norm_adv_by_std_in_grpo``).

    Returns:
        - ``siop/groups``: questions; ``siop/turns/mean``: assistant turns of a rollout
        - ``siop/no_answer``: share of rollouts without an answer (not of a method that reads none)
        - ``siop/zero_variance_groups``: share of questions whose advantages are all within the scorer's noise (and
          rounding), or that the noise floor has taken to 0, so that they give no update
        - ``siop/clusters_per_group``: mean over questions; ``siop/cluster_entropy``: entropy of the masses in nats,
          mean over questions with an answer (both only where the method clusters)
        - ``siop/heaviest_cluster_right``: share of the questions with a label whose heaviest cluster (largest target,
          among equals the one opened first) has a first reference that matches a gold answer exactly; over questions
          with a cluster
        - ``siop/target_mass``: target of the rollout's cluster (of the gold answer), mean over the rollouts that have
          one
        - ``siop/votes_moved``: share of a question's votes that passed to another answer, ½·Σ |v(c) − m(c)|, mean over
          questions with an answer (``siop_vote=informed``)
        - ``siop/evidence``: rho of the rollout's cluster, where it was computed
        - ``siop/support_first``, ``siop/support_last``: support at boundary 0 and at the last
        - ``siop/turn_reward/mean``, ``/std``: over all turn rewards, and by turn ``siop/turn_reward/turn_1/mean`` …;
          rollouts without turn rewards (in most modes those without an answer) count in none
        - ``siop/return_to_go/turn_1/mean``, ``/std`` …: what a turn is worth (``siop_return``), over the same rollouts
    """
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.uid, []).append(index)
    num_turns = [len(get_assistant_turn_ranges(rollout.response_mask)) for rollout in rollouts]
    updated = _rows_with_an_update(rewards.turn_rewards, num_turns, groups.values(), config, gamma, scale)
    values: dict[str, list[float]] = {
        "turns/mean": list(map(float, num_turns)),
        "no_answer": [not answer for answer in rewards.answers] if config.needs_scorer else [],
        "zero_variance_groups": [not updated & set(members) for members in groups.values()],
        "target_mass": [
            mass
            for mass, cluster_id, turns in zip(
                rewards.target_mass, rewards.cluster_ids, rewards.turn_rewards, strict=True
            )
            if (turns if config.siop_use_gold_ref else cluster_id is not None)
        ],
        "evidence": [rho for rho in rewards.evidence if rho is not None],
        "support_first": [support[0] for support in rewards.support if support],
        "support_last": [support[-1] for support in rewards.support if support],
    }
    if config.needs_scorer and not config.siop_use_gold_ref:
        clusters = [[rewards.cluster_ids[index] for index in members] for members in groups.values()]
        counts = [Counter(cluster_id for cluster_id in ids if cluster_id is not None) for ids in clusters]
        if any(counts) or not any(rewards.answers):
            values["clusters_per_group"] = [len(count) for count in counts]
            values["cluster_entropy"] = [_entropy(list(count.values())) for count in counts if count]
        values["votes_moved"] = _votes_moved(rewards, groups.values())
        values["heaviest_cluster_right"] = _heaviest_right(rewards, groups.values(), labels or [[]] * len(rollouts))
    metrics = {f"siop/{name}": math.fsum(items) / len(items) for name, items in values.items() if items}
    metrics["siop/groups"] = float(len(groups))
    metrics.update(_mean_and_std("siop/turn_reward", [reward for turns in rewards.turn_rewards for reward in turns]))
    for turn in range(max(map(len, rewards.turn_rewards), default=0)):
        at_turn = [turns[turn] for turns in rewards.turn_rewards if len(turns) > turn]
        metrics.update(_mean_and_std(f"siop/turn_reward/turn_{turn + 1}", at_turn))
    for turn, at_turn in enumerate(_returns_by_turn(rewards.turn_rewards, config, gamma)):
        metrics.update(_mean_and_std(f"siop/return_to_go/turn_{turn + 1}", at_turn))
    return metrics


def _votes_moved(rewards: GroupRewards, groups: Collection[Sequence[int]]) -> list[float]:
    """Of each question whose votes were passed on."""
    moved = []
    for members in groups:
        shares = {
            rewards.cluster_ids[index]: (votes, mass)
            for index in members
            if rewards.votes
            and (votes := rewards.votes[index]) is not None
            and (mass := rewards.masses[index]) is not None
        }
        if shares:
            moved.append(math.fsum(abs(votes - mass) for votes, mass in shares.values()) / 2)
    return moved


def _heaviest_right(
    rewards: GroupRewards, groups: Collection[Sequence[int]], labels: Sequence[Sequence[str]]
) -> list[float]:
    """1 or 0 for each question with a label and a cluster."""
    right = []
    for members in groups:
        clustered = [index for index in members if rewards.cluster_ids[index] is not None]
        if clustered and labels[members[0]]:
            heaviest = max(clustered, key=lambda index: rewards.target_mass[index])
            right.append(exact_match(rewards.references[heaviest][0], labels[members[0]]))
    return right


def _turns(
    rows: Sequence[Sequence[float]], group_B: np.ndarray, config: SiopConfig, gamma: float, scale: bool = False
) -> Turns:
    """Rows of turn rewards, each of one turn or more, as the baselines take them."""
    turns_B = np.array([len(row) for row in rows])
    reached_BT = np.arange(turns_B.max())[None, :] < turns_B[:, None]
    rewards_BT = np.zeros(reached_BT.shape)
    rewards_BT[reached_BT] = [reward for row in rows for reward in row]
    return Turns(rewards_BT, reached_BT, group_B, gamma, scale, config)


def _rows_with_an_update(
    turn_rewards: Sequence[Sequence[float]],
    num_turns: Sequence[int],
    groups: Collection[Sequence[int]],
    config: SiopConfig,
    gamma: float,
    scale: bool,
) -> set[int]:
    """The rollouts of which some turn has an advantage that is more than the scorer's noise and than rounding, and is
    left by the noise floor (:func:`~verl.utils.siop.credit.baselines.signal`) where it is scaled."""
    noise = config.reward_noise
    floor = max(NOISE_STDS * noise, STD_FLOOR)
    if config.outcome_advantage:
        sums = [math.fsum(row) for row in turn_rewards]
        with_turns = [[row for row in members if num_turns[row]] for members in groups]
        return {
            row
            for rows in with_turns
            if _differ([sums[row] for row in rows], floor, noise if scale else 0.0)
            for row in rows
        }
    group_of = {row: number for number, members in enumerate(groups) for row in members}
    kept = [row for row, number in enumerate(num_turns) if number]
    if not kept:
        return set()
    if config.siop_baseline == "pooled":  # which has no other floor
        floor = STD_FLOOR
    rows = [turn_rewards[row] or [0.0] * num_turns[row] for row in kept]
    group_B = np.unique([group_of[row] for row in kept], return_inverse=True)[1]
    baseline = BASELINES[config.siop_baseline]
    beyond_BT = abs(baseline(_turns(rows, group_B, config, gamma))) > floor
    if scale:
        beyond_BT &= abs(baseline(_turns(rows, group_B, config, gamma, scale=True))) > STD_FLOOR
    return {row for row, beyond_T in zip(kept, beyond_BT, strict=True) if beyond_T.any()}


def _differ(totals: Sequence[float], floor: float, noise: float) -> bool:
    """Whether GRPO's advantages of these totals are an update; a single one is compared with nothing, and is itself."""
    if len(totals) < 2:
        return abs(math.fsum(totals)) > floor
    return max(totals) - min(totals) > floor and bool(signal(np.std(totals, ddof=1), noise) > 0)


def _returns_by_turn(turn_rewards: Sequence[Sequence[float]], config: SiopConfig, gamma: float) -> list[list[float]]:
    """The returns of all rollouts that have rewards and reach a turn, for each turn."""
    rows = [row for row in turn_rewards if row]
    if not rows:
        return []
    turns = _turns(rows, np.zeros(len(rows), dtype=int), config, gamma)
    returns_BT = turns.returns()
    return [returns_BT[turns.reached_BT[:, turn], turn].tolist() for turn in range(returns_BT.shape[1])]


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
