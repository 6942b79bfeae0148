"""Votes that pass to better informed answers: by hand, by what holds for any votes, and in the targets of SIOP."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from method_helpers import Scorer, mixed_batch, run, search_rollout
from verl.utils.siop.credit.metrics import group_metrics
from verl.utils.siop.credit.votes import informed_votes, preferences
from verl.utils.siop.siop_process_reward import GroupRewards, Rollout, SiopConfig


def test_preferences_by_hand() -> None:
    # Answer 0: two that know of it alone, one that knows of 1 too; answer 1: one knows of both, one of 0 and 2 alone.
    assert preferences([[{0}, {0}, {0, 1}], [{0, 1}, {0, 2}], [{0, 1, 2}]]) == [[0, 1, 0], [1, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize(
    ("witnesses", "against", "passes"),
    [(1, 0, 1 / 2), (2, 0, 3 / 4), (3, 0, 7 / 8), (1, 1, 0.0), (2, 1, 3 / 8), (0, 2, 0.0)],
)
def test_a_vote_passes_as_surely_as_those_who_know_both_prefer_the_other(
    witnesses: int, against: int, passes: float
) -> None:
    back = {(0, 2): 3 / 4}.get((witnesses, against), 0.0)
    votes = informed_votes([0.8, 0.2], [[0, against], [witnesses, 0]])
    assert votes == pytest.approx([0.8 * (1 - passes) + 0.2 * back, 0.8 * passes + 0.2 * (1 - back)], abs=1e-12)


def test_the_share_of_a_coin_is_the_posterior() -> None:
    """P(share > 1/2) under Beta(wins + 1, losses + 1), by adding up the density."""
    share = (np.arange(200000) + 0.5) / 200000
    for wins, losses in ((3, 1), (5, 2), (4, 0)):
        density = share**wins * (1 - share) ** losses
        beyond = density[share > 0.5].sum() / density.sum()
        assert informed_votes([1.0, 0.0], [[0, losses], [wins, 0]])[1] == pytest.approx(2 * beyond - 1, abs=1e-6)


def test_votes_pass_on_along_a_chain_and_split_by_witnesses() -> None:
    # 0 stops first, 1 one hop later, 2 at the end: half of a vote for 0 goes to 1 and 2 alike, half of one for 1 to 2.
    chain = [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert informed_votes([1.0, 0.0, 0.0], chain) == pytest.approx([0.5, 0.125, 0.375])
    # Two witnesses for 1, one for 2: 3/4 pass, in proportion 2·(3/4) to 1·(1/2).
    assert informed_votes([1.0, 0.0, 0.0], [[0, 0, 0], [2, 0, 0], [1, 0, 0]]) == pytest.approx([0.25, 0.5625, 0.1875])


def test_a_circle_of_preferences_ends_wherever_else_there_are_answers() -> None:
    circle = [[0, 0, 9], [9, 0, 0], [0, 9, 0]]
    assert informed_votes([1 / 3] * 3, circle) == pytest.approx([1 / 3] * 3)
    alone = informed_votes([0.9, 0.05, 0.05], circle)
    for more in range(1, 4):
        masses = [0.9 - 0.001 * more, 0.05, 0.05] + [0.001] * more
        preferred = [[*row, *[0] * more] for row in circle] + [[0] * (3 + more)] * more
        assert informed_votes(masses, preferred)[:3] == pytest.approx(alone, abs=0.005)


def test_no_vote_is_lost_however_many_prefer_the_other() -> None:
    votes = informed_votes([0.1, 0.9], [[0, 0], [400, 0]])
    assert 0 < votes[0] < 1e-6 and sum(votes) == pytest.approx(1.0)


@st.composite
def asked(draw: st.DrawFn) -> tuple[list[float], list[list[int]]]:
    count = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 8), min_size=count, max_size=count))
    rows = draw(st.lists(st.lists(st.integers(0, 6), min_size=count, max_size=count), min_size=count, max_size=count))
    return [size / sum(sizes) for size in sizes], [
        [0 if c == d else number for d, number in enumerate(row)] for c, row in enumerate(rows)
    ]


@given(asked(), st.randoms())
def test_votes_stay_shares_whatever_the_order_of_the_answers(
    case: tuple[list[float], list[list[int]]], random: Any
) -> None:
    masses, preferred = case
    votes = informed_votes(masses, preferred)
    assert math.fsum(votes) == pytest.approx(1.0) and all(0 < share <= 1 + 1e-9 for share in votes)
    order = random.sample(range(len(masses)), len(masses))
    shuffled = informed_votes([masses[c] for c in order], [[preferred[c][d] for d in order] for c in order])
    assert shuffled == pytest.approx([votes[c] for c in order], abs=1e-8)
    assert informed_votes(masses, [[0] * len(masses) for _ in masses]) == pytest.approx(masses)


# --- in the targets ---------------------------------------------------------------------------------------------------


def stopping_early(question: str = "Q a") -> list[Rollout]:
    """Five stop at the country, two go on to its currency, one goes on and names another one that it has not read."""
    found = [search_rollout("a", "Peru", ["Lima is in Peru."]) for _ in range(5)]
    found += [search_rollout("a", "sol", ["Lima is in Peru.", "Peru pays in (sol)."]) for _ in range(2)]
    found.append(search_rollout("a", "peso", ["Lima is in Peru.", "Nothing found."]))
    for one in found:
        one.question = question
    return found


def shares(rewards: GroupRewards) -> list[float | None]:
    return [rewards.votes[row] for row in (0, 5, 7)]


def test_who_stops_early_passes_its_votes_to_who_went_on() -> None:
    rewards = run(stopping_early(), siop_vote="informed", siop_eta=0.0)
    # Both of those who know of Peru and sol say sol: 3/4 of Peru's votes pass. Peso is known to nobody.
    expected = [5 / 8 / 4, 2 / 8 + 3 / 4 * 5 / 8, 1 / 8]
    assert shares(rewards) == pytest.approx(expected)
    assert [rewards.target_mass[row] for row in (0, 5, 7)] == pytest.approx(expected)
    assert [rewards.masses[row] for row in (0, 5, 7)] == [5 / 8, 2 / 8, 1 / 8]
    counted = run(stopping_early(), siop_eta=0.0)
    assert counted.votes == [None] * 8 and counted.target_mass[0] == 5 / 8


def test_what_the_question_says_is_known_to_all() -> None:
    batch = [search_rollout("a", "Lima") for _ in range(3)]
    batch += [search_rollout("a", "Lima", ["Peru and Lima"]), search_rollout("a", "Peru", ["Peru"])]
    for one in batch:
        one.question = "Lima or Cusco, which is the capital?"
    # One that knows of both says Lima, one Peru.
    assert run(batch, siop_vote="informed", siop_eta=0.0).votes == pytest.approx([0.8, 0.8, 0.8, 0.8, 0.2])


def test_what_is_said_of_a_call_that_was_not_executed_is_no_knowledge() -> None:
    batch = [search_rollout("a", "Peru", ["Lima is in Peru."]) for _ in range(3)]
    batch.append(search_rollout("a", "query is missing", ["Lima is in Peru.", "invalid arguments: query is missing"]))
    believed = run(batch, siop_vote="informed", siop_eta=0.0).votes
    assert believed[3] == pytest.approx(1 / 4 + 3 / 8)
    search = [("search", "{}")]
    batch[3] = replace(batch[3], executed_calls=[search, [], []])
    rewards = run(batch, siop_vote="informed")
    assert rewards.votes == pytest.approx([3 / 4] * 3 + [1 / 4])
    assert rewards.evidence[3] == Scorer.entails("Lima is in Peru.", "query is missing")


def test_every_spelling_of_an_answer_counts_whatever_is_its_reference() -> None:
    one_answer = ("Peru", "Perou", "Republic of Peru", "country Peru")

    class Same(Scorer):
        async def cluster(self, question: str, answers: list[str]) -> list[int]:
            return [int(answer == "sol") for answer in answers]

    votes = []
    for names in (one_answer, one_answer[::-1]):
        batch = [search_rollout("a", name, ["Lima is in Perou."]) for name in names]
        batch.append(search_rollout("a", "sol", ["Lima is in Perou.", "They pay in sol."]))
        votes.append(run(batch, Same(), siop_vote="informed", siop_num_refs=1).votes)
    assert votes[0] == votes[1] == pytest.approx([0.4] * 4 + [0.6])


def test_evidence_weighs_the_votes() -> None:
    batch = stopping_early()
    batch[6] = search_rollout("a", "SOL", ["Lima is in Peru.", "Peru pays in SOL."])
    scorer = Scorer()
    rewards = run(batch, scorer, siop_vote="informed", siop_eta=2.0)
    weights = {
        row: rewards.votes[row] * math.exp(2.0 * rewards.evidence[row])  # type: ignore[operator]
        for row in (0, 5, 7)
    }
    for row, weight in weights.items():
        assert rewards.target_mass[row] == pytest.approx(weight / sum(weights.values()))
    assert rewards.target_mass[6] == rewards.target_mass[5]


def test_a_question_with_one_answer_or_none_keeps_its_votes() -> None:
    rewards = run(mixed_batch(), siop_vote="informed")
    assert [rewards.votes[row] for row in (1, 4, 6)] == [1.0, None, 1.0]
    assert run([search_rollout("a", None)], siop_vote="informed").votes == [None]


def test_query_consensus_ended_by_support_takes_the_votes_too() -> None:
    keys = {"siop_reward_mode": "query_consensus", "siop_consensus_terminal": "support"}
    counted, informed = (run(stopping_early(), siop_vote=vote, **keys) for vote in ("count", "informed"))
    assert informed.target_mass[0] < counted.target_mass[0] and informed.target_mass[5] > counted.target_mass[5]


def test_the_metrics_say_how_many_votes_passed() -> None:
    batch = [*stopping_early(), search_rollout("b", "yes", ["Doc"])]
    for vote, expected in (("informed", 3 / 4 * 5 / 8 / 2), ("count", None)):
        rewards = run(batch, siop_vote=vote, siop_eta=0.0)
        found = group_metrics(rewards, batch, SiopConfig(siop_vote=vote, siop_eta=0.0))
        assert found.get("siop/votes_moved") == (expected if expected is None else pytest.approx(expected))
