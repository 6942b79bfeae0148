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
from verl.utils.siop.credit.votes import informed_votes
from verl.utils.siop.siop_process_reward import GroupRewards, Rollout, SiopConfig


def case(*answers: tuple[int, set[int]]) -> list[list[set[int]]]:
    """``known`` of answers, each given so many times by rollouts that know of this; sets apart where they differ."""
    return [[knows] * count for count, knows in answers]


@pytest.mark.parametrize(
    ("keep", "reject", "passes"),
    [(1, 1, 3 / 8), (1, 2, 5 / 8), (2, 1, 0.0), (2, 2, 5 / 16), (3, 5, 21 / 32), (0, 1, 3 / 4), (7, 1, 0.0)],
)
def test_a_vote_passes_as_surely_as_those_who_know_of_its_answer_reject_it(
    keep: int, reject: int, passes: float
) -> None:
    # One more gives the answer without having read of it: it has a vote, and no say.
    known = [[{0}] * keep + [set()], [{0, 1}] * reject]
    of_first = (keep + 1) / (keep + 1 + reject)
    assert informed_votes(known) == pytest.approx([of_first * (1 - passes), 1 - of_first * (1 - passes)])


def test_the_share_of_heads_is_the_posterior() -> None:
    """P(share > 1/2) under Beta(reject + 2, keep + 1), by adding up the density."""
    share = (np.arange(200000) + 0.5) / 200000
    for keep, reject in ((1, 3), (2, 5), (0, 4)):
        density = share ** (reject + 1) * (1 - share) ** keep
        beyond = density[share > 0.5].sum() / density.sum()
        stays = informed_votes([[{0}] * keep + [set()], [{0, 1}] * reject])[0] * (keep + 1 + reject) / (keep + 1)
        assert 1 - stays == pytest.approx(2 * beyond - 1, abs=1e-6)


def test_votes_pass_on_along_a_chain_and_split_by_number() -> None:
    # 0 is kept by one, rejected by three (25/32 pass, two thirds of them to 1); 1 is kept by two, rejected by one.
    assert informed_votes(case((1, {0}), (2, {0, 1}), (1, {0, 1, 2}))) == pytest.approx(
        [7 / 32 / 4, 2 / 4 + 25 / 32 / 4 * 2 / 3, 1 / 4 + 25 / 32 / 4 / 3]
    )
    # The same, but one goes on from 1 to a third answer as well: 1 is kept by one, rejected by two, and passes 5/8.
    through = 25 / 32 / 4
    assert informed_votes(case((1, {0}), (1, {0, 1}), (2, {0, 1, 2}))) == pytest.approx(
        [1 / 4 - through, (1 / 4 + through / 3) * 3 / 8, 2 / 4 + through * 2 / 3 + (1 / 4 + through / 3) * 5 / 8]
    )


def test_one_that_goes_too_far_outvotes_nobody() -> None:
    assert informed_votes(case((7, {0}), (1, {0, 1}))) == pytest.approx([7 / 8, 1 / 8])


def test_who_does_not_know_of_its_own_answer_rejects_but_receives_nothing() -> None:
    votes = informed_votes(case((2, {0}), (2, {0, 1}), (4, {0})))
    rejected = 2 * sum(math.comb(10, heads) for heads in range(8)) / 2**10 - 1  # six against two
    assert votes == pytest.approx([2 / 8 * (1 - rejected), 2 / 8 + 2 / 8 * rejected, 4 / 8])


def test_a_circle_ends_and_leaves_others_alone() -> None:
    circle = case((1, {0, 1}), (1, {1, 2}), (1, {2, 0}))
    assert informed_votes(circle) == pytest.approx([1 / 3] * 3)
    votes = informed_votes([*circle, [{3}]])
    assert votes == pytest.approx([1 / 4] * 4)
    everybody = case((1, {0, 1, 2}), (5, {0, 1, 2}), (2, {0, 1, 2}))
    assert sum(informed_votes(everybody)) == pytest.approx(1.0)


def test_no_vote_is_lost_however_many_reject_an_answer() -> None:
    votes = informed_votes(case((100, set()), (400, {0, 1})))
    assert 0 < votes[0] < 1e-6 and sum(votes) == pytest.approx(1.0)


@st.composite
def asked(draw: st.DrawFn) -> list[list[set[int]]]:
    count = draw(st.integers(1, 5))
    knows = st.sets(st.integers(0, count - 1))
    return [draw(st.lists(knows, min_size=1, max_size=6)) for _ in range(count)]


@given(asked(), st.randoms())
def test_votes_stay_shares_whatever_the_order_of_the_answers(known: list[list[set[int]]], random: Any) -> None:
    votes = informed_votes(known)
    assert math.fsum(votes) == pytest.approx(1.0) and all(0 < share <= 1 + 1e-9 for share in votes)
    order = random.sample(range(len(known)), len(known))
    place = {answer: index for index, answer in enumerate(order)}
    shuffled = informed_votes([[{place[c] for c in knows} for knows in known[answer]] for answer in order])
    assert shuffled == pytest.approx([votes[answer] for answer in order], abs=1e-8)
    masses = [len(rollouts) / sum(map(len, known)) for rollouts in known]
    own = [[knows & {answer} for knows in rollouts] for answer, rollouts in enumerate(known)]
    assert informed_votes(own) == pytest.approx(masses)


# --- in the targets ---------------------------------------------------------------------------------------------------


def stopping_early() -> list[Rollout]:
    """Three stop at the country, three go on to its currency, one goes on and names another one that it has not read;
    one has no answer."""
    found = [search_rollout("a", "Peru", ["Lima is in Peru."]) for _ in range(3)]
    found += [search_rollout("a", "sol", ["Lima is in Peru.", "Peru pays in (sol)."]) for _ in range(3)]
    found.append(search_rollout("a", "peso", ["Lima is in Peru.", "Nothing found."]))
    found.append(search_rollout("a", None, ["Lima is in Peru."]))
    return found


# Of the seven who know of Peru and answer, four reject it: P(Beta(6, 4) > 1/2).
REJECTED = 2 * sum(math.comb(9, heads) for heads in range(6)) / 2**9 - 1
INFORMED = [3 / 7 * (1 - REJECTED), 3 / 7 + 3 / 7 * REJECTED, 1 / 7]
ROWS = (0, 3, 6)


def shares(rewards: GroupRewards) -> list[float | None]:
    return [rewards.votes[row] for row in ROWS]


def test_who_stops_early_passes_its_votes_to_who_went_on() -> None:
    rewards = run(stopping_early(), siop_vote="informed", siop_eta=0.0)
    assert shares(rewards) == pytest.approx(INFORMED)
    assert [rewards.target_mass[row] for row in ROWS] == pytest.approx(INFORMED)
    assert [rewards.masses[row] for row in ROWS] == [3 / 7, 3 / 7, 1 / 7] and rewards.votes[7] is None
    counted = run(stopping_early(), siop_eta=0.0)
    assert counted.votes == [None] * 8 and counted.target_mass[0] == 3 / 7


def test_what_the_question_says_is_known_to_all() -> None:
    batch = [search_rollout("a", "Lima"), *(search_rollout("a", "Peru", ["Peru"]) for _ in range(2))]
    for one in batch:
        one.question = "Lima or Cusco, which is the capital?"
    # One keeps Lima, two reject it.
    assert run(batch, siop_vote="informed", siop_eta=0.0).votes == pytest.approx([1 / 8, 7 / 8, 7 / 8])


def test_what_is_said_of_a_call_that_was_not_executed_is_no_knowledge() -> None:
    batch = [search_rollout("a", "Peru", ["Lima is in Peru."])]
    batch += [search_rollout("a", "query is missing", ["Lima is in Peru.", "query is missing"]) for _ in range(3)]
    assert run(batch, siop_vote="informed", siop_eta=0.0).votes[0] == pytest.approx(1 / 4 * (1 - 25 / 32))
    search = [("search", "{}")]
    batch[1:] = [replace(one, executed_calls=[search, [], []]) for one in batch[1:]]
    rewards = run(batch, siop_vote="informed")
    assert rewards.votes == pytest.approx([1 / 4] + [3 / 4] * 3)
    assert rewards.evidence[1] == Scorer.entails("Lima is in Peru.", "query is missing")


def test_every_spelling_of_an_answer_counts_whatever_is_its_reference() -> None:
    class Same(Scorer):
        async def cluster(self, question: str, answers: list[str]) -> list[int]:
            return [int(answer == "sol") for answer in answers]

    votes = []
    for names in (("Peru", "Perou"), ("Perou", "Peru")):
        batch = [search_rollout("a", name, ["Lima is in Perou."]) for name in names]
        batch += [search_rollout("a", "sol", ["Lima is in Perou.", "They pay in sol."]) for _ in range(2)]
        votes.append(run(batch, Same(), siop_vote="informed", siop_num_refs=1).votes)
    of_peru = 1 / 2 * (1 - 5 / 16)
    assert votes[0] == votes[1] == pytest.approx([of_peru] * 2 + [1 - of_peru] * 2)


def test_evidence_weighs_the_votes() -> None:
    batch = stopping_early()
    rewards = run(batch, siop_vote="informed", siop_eta=2.0)
    weights = {
        row: rewards.votes[row] * math.exp(2.0 * rewards.evidence[row])  # type: ignore[operator]
        for row in ROWS
    }
    for row, weight in weights.items():
        assert rewards.target_mass[row] == pytest.approx(weight / sum(weights.values()))


def test_a_question_with_one_answer_or_none_keeps_its_votes() -> None:
    rewards = run(mixed_batch(), siop_vote="informed")
    assert [rewards.votes[row] for row in (1, 4, 6)] == [1.0, None, 1.0]
    assert run([search_rollout("a", None)], siop_vote="informed").votes == [None]


def test_query_consensus_ended_by_support_takes_the_votes_too() -> None:
    keys = {"siop_reward_mode": "query_consensus", "siop_consensus_terminal": "support"}
    counted, informed = (run(stopping_early(), siop_vote=vote, **keys) for vote in ("count", "informed"))
    assert informed.target_mass[0] < counted.target_mass[0] and informed.target_mass[3] > counted.target_mass[3]


def test_the_metrics_say_how_many_votes_passed() -> None:
    batch = [*stopping_early(), search_rollout("b", "yes", ["Doc"])]
    for vote, expected in (("informed", 3 / 7 * REJECTED / 2), ("count", None)):
        rewards = run(batch, siop_vote=vote, siop_eta=0.0)
        found = group_metrics(rewards, batch, SiopConfig(siop_vote=vote, siop_eta=0.0))
        assert found.get("siop/votes_moved") == (expected if expected is None else pytest.approx(expected))
