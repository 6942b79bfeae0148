"""Rewards of a step, question by question while others generate or all at the end: the same, whatever fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from method_helpers import FailingScorer, byte_tokenizer, mixed_batch, run, search_rollout
from verl.trainer.siop import scoring
from verl.trainer.siop.scoring import EveryGroupDropped, RewardStream, Scores, TimedScorer, open_client, score_batch
from verl.utils.siop.errors import ScorerError, ScorerUnavailable
from verl.utils.siop.siop_process_reward import Rollout, SiopConfig

ROLLOUTS = [search_rollout(uid, answer, ["x is here"]) for uid in ("a", "b", "c") for answer in ("x", "y")]
TOKENS = {"siop/tokens/computed", "siop/tokens/requested"}
CALLS = {f"siop/seconds/{kind}" for kind in ("cluster", "entailment", "support")}

Way = Callable[..., Scores]


def _groups(rollouts: list[Rollout]) -> dict[str, list[Rollout]]:
    return {uid: [item for item in rollouts if item.uid == uid] for uid in dict.fromkeys(r.uid for r in rollouts)}


def at_once(rollouts: list[Rollout], **keys: Any) -> Scores:
    async def score() -> Scores:
        siop = SiopConfig(**keys)
        return await score_batch(rollouts, byte_tokenizer(), siop, TimedScorer(open_client(siop)))

    return asyncio.run(score())


def streamed(rollouts: list[Rollout], **keys: Any) -> Scores:
    """All questions but the last are there before the end, in another order."""
    stream = RewardStream(SiopConfig(**keys), byte_tokenizer())
    for group in list(_groups(rollouts).values())[-2::-1]:
        stream.add(group)
        time.sleep(0.01)
    return stream.collect(rollouts)


ways = pytest.mark.parametrize("way", [at_once, streamed])


@pytest.fixture(autouse=True)
def _scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "ScoringClient", FailingScorer)
    monkeypatch.setattr(FailingScorer, "bad", ())


@ways
@pytest.mark.parametrize("mode", ["process", "cluster_frequency", "query_consensus"])
def test_all_rows_are_scored(way: Way, mode: str) -> None:
    for rollouts in (ROLLOUTS, mixed_batch()):
        scores = way(rollouts, siop_reward_mode=mode)
        assert sorted(scores.rows) == list(range(len(rollouts))) and scores.dropped == set()
        expected = run([rollouts[row] for row in scores.rows], siop_reward_mode=mode)
        assert scores.rewards == expected
    assert set(scores.cost) >= TOKENS
    assert not any(thread.name == "rewards" for thread in threading.enumerate())


def test_seconds_and_tokens() -> None:
    cost = at_once(ROLLOUTS).cost
    assert set(cost) == CALLS | TOKENS and all(value > 0 for value in cost.values())
    cost = streamed(ROLLOUTS).cost
    assert set(cost) == CALLS | TOKENS | {"siop/seconds/busy", "siop/seconds/exposed"}
    assert all(value > 0 for value in cost.values())


class SlowScorer(FailingScorer):
    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        await asyncio.sleep(1.5 if question != "Q c" else 0.0)
        return await super().cluster(question, answers)


def test_what_is_scored_before_the_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "ScoringClient", SlowScorer)
    stream = RewardStream(SiopConfig(), byte_tokenizer())
    for uid in ("a", "b"):
        stream.add(_groups(ROLLOUTS)[uid])
    time.sleep(2.5)
    cost = stream.collect(ROLLOUTS).cost
    # Both were waited for at the same time.
    assert 1.5 <= cost["siop/seconds/busy"] < 3.0 and cost["siop/seconds/exposed"] < 1.5


def test_seconds_of_calls_at_the_same_time_count_once() -> None:
    async def many() -> float:
        scorer = TimedScorer(SlowScorer())  # type: ignore[arg-type]
        start = time.perf_counter()
        await asyncio.gather(*(scorer.cluster("Q", ["x"]) for _ in range(20)))
        await scorer.cluster("Q", ["x"])
        assert 3.0 <= scorer.seconds["cluster"] <= time.perf_counter() - start
        return scorer.seconds["entailment"]

    assert asyncio.run(many()) == 0


@ways
@pytest.mark.parametrize(
    ("nli", "shown"),
    [(None, {}), ("lexical", {"siop/evidence_backend": 0.0}), ("org/deberta", {"siop/evidence_backend": 1.0})],
)
def test_the_metrics_say_who_gave_the_evidence(
    way: Way, monkeypatch: pytest.MonkeyPatch, nli: str | None, shown: dict[str, float]
) -> None:
    monkeypatch.setattr(FailingScorer, "nli", nli, raising=False)
    cost = way(ROLLOUTS).cost
    assert {key: value for key, value in cost.items() if key == "siop/evidence_backend"} == shown


def _recorded(calls: list[Any]) -> type[FailingScorer]:
    class RecordingScorer(FailingScorer):
        async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
            calls.append(list(pairs))
            return await super().entailment(pairs)

        async def support(self, rollouts: Any) -> list[list[list[float]]]:
            calls.append([(item.prompt_ids, item.response_ids) for item in rollouts])
            return await super().support(rollouts)

    return RecordingScorer


@ways
def test_the_scorer_gets_the_same_requests_whatever_the_uids_and_the_order_of_the_rows(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(scoring, "ScoringClient", _recorded(calls))
    expected = way(ROLLOUTS)
    first, calls[:] = list(calls), []
    other = [replace(item, uid={"a": "z", "b": "y", "c": "x"}[item.uid]) for item in ROLLOUTS]
    scores = way(other[4:] + other[:4])
    # One by one they come in any order; what is in one request is the same.
    assert sorted(map(repr, calls)) == sorted(map(repr, first))
    assert len(first) == (2 if way is at_once else 6)
    of = dict(zip(scores.rows, scores.rewards.turn_rewards, strict=True))
    assert [of[row] for row in (2, 3, 4, 5, 0, 1)] == expected.rewards.turn_rewards


@ways
@pytest.mark.parametrize("strict", [True, False])
def test_the_entailment_rule_reaches_the_scorer(way: Way, monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    given: list[dict[str, Any]] = []

    class NotedScorer(FailingScorer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            given.append(kwargs)

    monkeypatch.setattr(scoring, "ScoringClient", NotedScorer)
    way(ROLLOUTS, siop_strict_entailment=strict)
    assert [options["strict"] for options in given] == [strict]


@ways
def test_a_scorer_error_ends_the_run_by_default(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingScorer, "bad", ("Q b",))
    with pytest.raises(ScorerError, match="cannot score Q b"):
        way(ROLLOUTS)
    assert not any(thread.name == "rewards" for thread in threading.enumerate())


def test_a_failure_ends_the_step_before_all_have_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingScorer, "bad", ("Q a",))
    stream, groups = RewardStream(SiopConfig(), byte_tokenizer()), _groups(ROLLOUTS)
    stream.add(groups["a"])
    with pytest.raises(ScorerError, match="cannot score Q a"):
        while True:
            stream.add(groups["b"])
            time.sleep(0.01)
    stream.close()
    stream.close()


@ways
def test_drop_group_leaves_out_the_failed_question_alone(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingScorer, "bad", ("Q b",))
    scores = way(ROLLOUTS, siop_on_scorer_error="drop_group")
    assert scores.dropped == {"b"} and scores.rows == [0, 1, 4, 5]
    assert scores.rewards == run([ROLLOUTS[row] for row in scores.rows])


@ways
def test_nothing_left_is_an_error(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingScorer, "bad", ("Q a", "Q b", "Q c"))
    with pytest.raises(EveryGroupDropped, match="all 3 questions"):
        way(ROLLOUTS, siop_on_scorer_error="drop_group")


@ways
def test_an_absent_scorer_ends_the_run(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ScorerUnavailable, match=r"127\.0\.0\.1:9"):
        way(ROLLOUTS, siop_scorer_url="http://127.0.0.1:9", siop_scorer_timeout_s=0.2)


def test_a_question_that_has_changed_since_is_scored_again() -> None:
    stream = RewardStream(SiopConfig(), byte_tokenizer())
    groups = _groups(ROLLOUTS)
    stream.add(groups["a"][:1])  # of another session
    for uid in ("b", "c"):
        stream.add(groups[uid])
    stream.add([search_rollout("d", "z", ["y"])])  # of no use in the end
    assert stream.collect(ROLLOUTS).rewards == run(ROLLOUTS)


def test_what_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class HangingScorer(FailingScorer):
        async def support(self, rollouts: Any) -> list[list[list[float]]]:
            await asyncio.sleep(3600)
            raise AssertionError

    monkeypatch.setattr(scoring, "ScoringClient", HangingScorer)
    stream = RewardStream(SiopConfig(), byte_tokenizer())
    stream.add(ROLLOUTS[:2])
    stream.close()
    assert not any(thread.name == "rewards" for thread in threading.enumerate())
