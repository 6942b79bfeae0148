"""The metric that needs labels: how often a question's heaviest cluster is right."""

from __future__ import annotations

from collections.abc import Sequence

from method_helpers import search_rollout
from verl.utils.siop.credit.metrics import group_metrics
from verl.utils.siop.siop_process_reward import GroupRewards, SiopConfig

NAME = "siop/heaviest_cluster_right"


def _share(
    groups: Sequence[Sequence[tuple[int | None, float, str]]], labels: list[list[str]], config: SiopConfig | None = None
) -> float | None:
    """The metric for rollouts of (cluster, q, first reference), question by question."""
    rows = [row for group in groups for row in group]
    batch = [search_rollout(f"q{number}", "x") for number, group in enumerate(groups) for _ in group]
    rewards = GroupRewards(
        turn_rewards=[[q] for _, q, _ in rows],
        target_mass=[q for _, q, _ in rows],
        references=[[text] if text else [] for _, _, text in rows],
        cluster_ids=[cluster for cluster, _, _ in rows],
        support=[[] for _ in rows],
        answers=[text for _, _, text in rows],
        evidence=[None for _ in rows],
    )
    gold = [label for label, group in zip(labels, groups, strict=True) for _ in group]
    return group_metrics(rewards, batch, config or SiopConfig(), labels=gold).get(NAME)


def test_share_of_questions_whose_heaviest_cluster_is_right() -> None:
    right = [(0, 0.3, "Rome"), (1, 0.7, "The Paris!"), (1, 0.7, "The Paris!")]
    wrong = [(0, 0.7, "Rome"), (1, 0.3, "Paris"), (None, 0.0, "")]
    assert _share([right, wrong], [["paris", "x"], ["Paris"]]) == 0.5
    assert _share([right], [["paris"]]) == 1.0


def test_among_equals_the_first_cluster_counts() -> None:
    group = [(None, 0.0, ""), (1, 0.5, "Paris"), (0, 0.5, "Rome")]
    assert _share([group], [["Paris"]]) == 1.0 and _share([group], [["Rome"]]) == 0.0


def test_only_questions_with_a_label_and_a_cluster_count() -> None:
    right, silent = [(0, 1.0, "Paris")], [(None, 0.0, "")]
    assert _share([right, silent, right], [["Paris"], ["Paris"], []]) == 1.0
    assert _share([right, silent], [[], ["Paris"]]) is None
    assert _share([right], [["Paris"]], SiopConfig(siop_use_gold_ref=True)) is None
    rewards = GroupRewards([[1.0]], [1.0], [["Paris"]], [0], [[]], ["Paris"], [None])
    assert NAME not in group_metrics(rewards, [search_rollout("q", "Paris")], SiopConfig())
