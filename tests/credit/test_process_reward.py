"""From rollouts to turn rewards: golden numbers, every variant, edge cases and a scorer that answers wrongly."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import GoldenScorer, golden, golden_rollouts
from hypothesis import given, settings
from hypothesis import strategies as st
from method_helpers import (
    Scorer,
    byte_tokenizer,
    mixed_batch,
    query_batch,
    query_rollout,
    rollout,
    run,
    search_rollout,
    tool_result,
)
from verl.trainer.siop.advantage import compute_siop_advantage
from verl.utils.reward_score.siop_reward import place_turn_rewards
from verl.utils.siop.credit.batch import CreditBatch
from verl.utils.siop.credit.metrics import group_metrics
from verl.utils.siop.errors import RolloutError, ScorerError
from verl.utils.siop.siop_process_reward import (
    OBSERVATION_CHARACTERS,
    GroupRewards,
    Rollout,
    SiopConfig,
    SupportRequest,
    build_reference,
)
from verl.utils.siop.turn_utils import boundaries, get_assistant_turn_ranges

TOLERANCE = 1e-5


@pytest.mark.parametrize("number", range(len(golden("pipeline.json"))))
def test_golden_pipeline(number: int) -> None:
    case = golden("pipeline.json")[number]
    rewards = run(golden_rollouts(case), GoldenScorer(case), **case["config"])
    expected = case["expected"]
    assert rewards.target_mass == pytest.approx(expected["q"], abs=TOLERANCE)
    assert [(references or [""])[0] for references in rewards.references] == expected["reference"]
    assert [len(turns) for turns in rewards.turn_rewards] == [len(turns) for turns in expected["turn_rewards"]]
    for got, want in zip(rewards.turn_rewards, expected["turn_rewards"], strict=True):
        assert got == pytest.approx(want, abs=TOLERANCE)


# --- variants ---------------------------------------------------------------------------------------------------------


PARIS, LYON, NICE, BLUE, NOBODY = (0, 3), (2,), (5,), (1, 6), (4,)


def expected_evidence(hypothesis: str, results_of_members: list[list[str]]) -> float:
    means = [sum(Scorer.entails(doc, hypothesis) for doc in docs) / len(docs) for docs in results_of_members if docs]
    return sum(means) / len(means) if means else 0.0


def test_siop_from_first_principles() -> None:
    batch, scorer = mixed_batch(), Scorer()
    rewards = run(batch, scorer, siop_eta=2.0, siop_lambda=0.25)
    assert rewards.answers == ["Paris", "blue", "Lyon", "paris", "", "Nice", "Blue"]
    assert rewards.cluster_ids == [0, 0, 1, 0, None, 2, 0]
    paris, blue = ["Paris", "paris"], ["blue", "Blue"]
    assert rewards.references == [paris, blue, ["Lyon"], paris, [], ["Nice"], blue]
    rho = {
        PARIS: expected_evidence("Paris", [["Doc 1", "Doc 2"], ["Doc 1", "Doc 4", "Doc 5"]]),
        LYON: expected_evidence("Lyon", [["Doc 3"]]),
        NICE: 0.0,
    }
    weight = {cluster: len(cluster) / 4 * math.exp(2.0 * rho[cluster]) for cluster in rho}
    target = {cluster: value / sum(weight.values()) for cluster, value in weight.items()} | {BLUE: 1.0, NOBODY: 0.0}
    for cluster, q in target.items():
        for index in cluster:
            assert rewards.target_mass[index] == pytest.approx(q, abs=1e-12)
            assert rewards.evidence[index] == (pytest.approx(rho[cluster], abs=1e-12) if cluster in rho else None)

    assert [index for index, support in enumerate(rewards.support) if support] == [0, 1, 2, 3, 6]
    for index, cluster in ((0, PARIS), (2, LYON), (3, PARIS), (1, BLUE), (6, BLUE)):
        turns = get_assistant_turn_ranges(batch[index].response_mask)
        p = []
        for boundary in [0] + [end for _, end in turns[:-1]] + [turns[-1][0]]:
            request = SupportRequest(batch[index].prompt_ids, batch[index].response_ids, [], [])
            values = [math.exp(Scorer.log_prob(request, boundary, text)) for text in rewards.references[index]]
            p.append(sum(values) / len(values))
        assert rewards.support[index] == pytest.approx(p, abs=1e-12)
        expected = [target[cluster] * max(0.0, value - max(p[:turn])) for turn, value in enumerate(p) if turn]
        expected[-1] += 0.75 * target[cluster]
        assert rewards.turn_rewards[index] == pytest.approx(expected, abs=1e-12)
    assert rewards.turn_rewards[5] == pytest.approx([0.75 * target[NICE]])
    assert rewards.turn_rewards[4] == []


def test_the_scorer_is_asked_once_for_all_and_never_twice_for_the_same() -> None:
    scorer = Scorer()
    run(mixed_batch(), scorer)
    assert sorted(scorer.cluster_calls) == [("Q a", ["Paris", "Lyon", "paris", "Nice"]), ("Q b", ["blue", "Blue"])]
    (pairs,) = scorer.entailment_calls
    # Doc 1 is an observation of two members. Question b has one cluster, so its evidence cannot matter.
    paris = [(f"Doc {number}", "Paris") for number in (1, 2, 4, 5)]
    assert sorted(pairs) == sorted([*paris, ("Doc 3", "Lyon")])
    (requests,) = scorer.support_calls
    assert len(requests) == 5


def test_questions_are_clustered_concurrently_and_a_failure_ends_the_others() -> None:
    class Slow(Scorer):
        waiting, most, cancelled = 0, 0, 0

        async def cluster(self, question: str, answers: list[str]) -> list[int]:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            try:
                await asyncio.sleep(0.01 if question == "Q 0" else 5)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            raise ScorerError("no")

    scorer = Slow()

    async def both() -> None:
        from verl.utils.siop.siop_process_reward import compute_group_rewards

        batch = [search_rollout(str(n % 4), f"answer {n}") for n in range(8)]
        with pytest.raises(ScorerError, match="no"):
            await compute_group_rewards(batch, byte_tokenizer(), SiopConfig(), scorer)
        await asyncio.sleep(0)
        assert scorer.most == 4
        assert scorer.cancelled == 3

    asyncio.run(both())


def test_lambda_changes_the_terminal_reward_only() -> None:
    low, high = run(mixed_batch(), siop_lambda=0.2), run(mixed_batch(), siop_lambda=1.0)
    assert low.target_mass == high.target_mass
    assert low.support == high.support
    for a, b, q in zip(low.turn_rewards, high.turn_rewards, low.target_mass, strict=True):
        assert a[:-1] == b[:-1]
        if a:
            assert a[-1] - b[-1] == pytest.approx(0.8 * q)


def test_eta_zero_asks_for_no_evidence() -> None:
    scorer = Scorer()
    rewards = run(mixed_batch(), scorer, siop_eta=0.0)
    assert scorer.entailment_calls == []
    assert rewards.target_mass == [0.5, 1.0, 0.25, 0.5, 0.0, 0.25, 1.0]
    assert rewards.evidence == [None] * 7
    assert run(mixed_batch(), siop_eta=3.0).target_mass != run(mixed_batch(), siop_eta=1.0).target_mass
    assert run(mixed_batch(), siop_eta=3.0).support == rewards.support


def test_evidence_is_averaged_or_maximal_over_the_observations_of_a_rollout() -> None:
    mean, largest = run(mixed_batch()), run(mixed_batch(), siop_evidence="max")
    by_member = [[Scorer.entails(f"Doc {n}", "Paris") for n in documents] for documents in ((1, 2), (1, 4, 5))]
    assert mean.evidence[0] == pytest.approx((sum(by_member[0]) / 2 + sum(by_member[1]) / 3) / 2, abs=1e-12)
    assert largest.evidence[0] == pytest.approx((max(by_member[0]) + max(by_member[1])) / 2, abs=1e-12)
    assert largest.evidence[5] == mean.evidence[5] == 0.0
    assert (largest.support, largest.references) == (mean.support, mean.references)
    weights = [2 / 4 * math.exp(largest.evidence[0] or 0), 1 / 4 * math.exp(largest.evidence[2] or 0), 1 / 4]
    assert largest.target_mass[0] == pytest.approx(weights[0] / sum(weights))


def test_a_large_eta_does_not_overflow() -> None:
    rewards = run(mixed_batch(), siop_eta=1e6)
    assert math.fsum(rewards.target_mass[index] for index in (0, 2, 5)) == pytest.approx(1.0)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_num_refs(limit: int) -> None:
    spellings = ["Paris", "PARIS", "Paris", "paris", "The Paris"]
    scorer = Scorer()
    rewards = run([search_rollout("a", answer, ["Doc"]) for answer in spellings], scorer, siop_num_refs=limit)
    wanted = ["Paris", "PARIS", "paris", "The Paris"][:limit]
    assert rewards.references == [wanted] * 5
    assert [[r.text for r in request.references] for request in scorer.support_calls[0]] == [wanted] * 5
    assert rewards.target_mass == [1.0] * 5


@pytest.mark.parametrize("mode", ["before_answer", "assistant", "observation"])
def test_boundary(mode: str) -> None:
    batch, scorer = mixed_batch(), Scorer()
    rewards = run(batch, scorer, siop_boundary=mode)
    asked = [item for index, item in enumerate(batch) if index in (0, 1, 2, 3, 6)]
    assert [request.boundaries for request in scorer.support_calls[0]] == [
        boundaries(get_assistant_turn_ranges(item.response_mask), mode) for item in asked
    ]
    assert rewards.target_mass == run(batch).target_mass
    if mode == "observation":
        assert rewards.turn_rewards[0][-1] == 0.5 * rewards.target_mass[0]  # the last turn has no gain


def test_gain_and_epsilon() -> None:
    prob = run(mixed_batch(), siop_gain="prob")
    log = run(mixed_batch(), siop_gain="log", siop_epsilon=0.1)
    assert prob.support == log.support
    for support, q, a, b in zip(prob.support, prob.target_mass, prob.turn_rewards, log.turn_rewards, strict=True):
        if support:
            terminal = [0.0] * (len(a) - 1) + [0.5 * q]
            gains = zip(support[:-1], support[1:], terminal, strict=True)
            assert a == pytest.approx([q * (p1 - p0) + end for p0, p1, end in gains])
            gains = zip(support[:-1], support[1:], terminal, strict=True)
            assert b == pytest.approx([q * (math.log(p1 + 0.1) - math.log(p0 + 0.1)) + end for p0, p1, end in gains])
    assert run(mixed_batch(), siop_gain="prob", siop_epsilon=0.1).turn_rewards == prob.turn_rewards
    assert run(mixed_batch(), siop_gain="log").turn_rewards != log.turn_rewards


def test_peak_gain_pays_for_new_heights_only() -> None:
    prob, peak = run(mixed_batch(), siop_gain="prob"), run(mixed_batch())
    assert prob.support == peak.support and prob.turn_rewards != peak.turn_rewards
    for support, q, rewards in zip(peak.support, peak.target_mass, peak.turn_rewards, strict=True):
        if support:
            gains = [max(0.0, p - max(support[:t])) for t, p in enumerate(support) if t]
            assert rewards == pytest.approx([*(q * gain for gain in gains[:-1]), q * gains[-1] + 0.5 * q])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_peak_gains_add_up_to_the_rise_of_the_maximum(support: list[float]) -> None:
    batch: Any = SimpleNamespace(config=SiopConfig())
    gains = CreditBatch.gains(batch, support)
    assert min(gains) >= 0
    assert sum(gains) == pytest.approx(max(support) - support[0])
    # A detour through lower support earns nothing and changes nothing after it.
    assert CreditBatch.gains(batch, [support[0], support[0] / 2, *support]) == [0.0, 0.0, *gains]


def test_strict_entailment_is_the_scorers_business() -> None:
    assert run(mixed_batch(), siop_strict_entailment=False) == run(mixed_batch())


def terminal(turns: list[int], values: list[float | None]) -> list[list[float]]:
    return [[] if v is None else [0.0] * (t - 1) + [v] for t, v in zip(turns, values, strict=True)]


def test_ttrl_and_empo_pay_the_last_turn_and_ask_for_clusters_only() -> None:
    turns = [3, 2, 2, 4, 2, 1, 3]
    for mode, values in (
        ("majority_binary", [1.0, 1.0, 0.0, 1.0, None, 0.0, 1.0]),
        ("cluster_frequency", [0.5, 1.0, 0.25, 0.5, None, 0.25, 1.0]),
    ):
        scorer = Scorer()
        rewards = run(mixed_batch(), scorer, siop_reward_mode=mode, siop_lambda=0.9)
        assert rewards.turn_rewards == terminal(turns, values)
        assert rewards.target_mass == [value or 0.0 for value in values]
        assert rewards.cluster_ids == [0, 0, 1, 0, None, 2, 0]
        assert rewards.support == [[]] * 7
        assert len(scorer.cluster_calls) == 2
        assert scorer.entailment_calls == scorer.support_calls == []


def test_ttrl_tie_goes_to_the_cluster_that_opened_first() -> None:
    batch = [search_rollout("a", answer) for answer in ("x", "y", "z", "z", "y")]
    assert run(batch, siop_reward_mode="majority_binary").target_mass == [0.0, 1.0, 0.0, 0.0, 1.0]


def test_query_consensus_with_frequency_by_hand() -> None:
    scorer = Scorer()
    rewards = run(query_batch(), scorer, siop_reward_mode="query_consensus", siop_consensus_terminal="frequency")
    # Five rollouts of question a: 4 issue "capital", 3 "river", 1 "mayor". Masses of the 4 answers: 2/4, 1/4, 1/4.
    assert rewards.turn_rewards == [
        [3 / 4, 0.0, 2 / 4, 2 / 4],
        [3 / 4, 0.0, 2 / 4],
        [(3 + 2) / 2 / 4, 1 / 4],
        [2 / 4, 3 / 4, 0.0],
        [0.0, 1.0],
        [1 / 4],
    ]
    assert rewards.target_mass == [0.5, 0.5, 0.25, 0.0, 1.0, 0.25]
    assert scorer.support_calls == scorer.entailment_calls == []


def test_query_consensus_with_support_pays_what_the_searches_added() -> None:
    keys: dict[str, Any] = {
        "siop_reward_mode": "query_consensus",
        "siop_consensus_terminal": "support",
        "siop_gain": "prob",
    }
    rewards, plain = run(query_batch(), **keys), run(query_batch())
    assert rewards.target_mass == plain.target_mass
    assert rewards.support == plain.support
    queries = run(query_batch(), siop_reward_mode="query_consensus")
    for index in range(5):
        turns, support = rewards.turn_rewards[index], rewards.support[index]
        assert turns[:-1] == queries.turn_rewards[index][:-1]
        gained = rewards.target_mass[index] * (support[-1] - support[0]) if support else 0.0
        assert turns[-1] == pytest.approx(gained)
    assert rewards.turn_rewards[5] == [0.0]  # an answer without a search earns nothing
    for gain in ("peak", "prob", "log", "gap"):  # together what SIOP pays turn by turn
        ended = run(query_batch(), **{**keys, "siop_gain": gain})
        sums = [math.fsum(turns) for turns in run(query_batch(), siop_gain=gain, siop_lambda=1.0).turn_rewards]
        found = [turns[-1] for turns in ended.turn_rewards]
        assert found == pytest.approx([total if p else 0.0 for total, p in zip(sums, ended.support, strict=True)])
    log = run(query_batch(), **{**keys, "siop_gain": "log"}, siop_epsilon=0.1)
    p = log.support[0]
    assert log.turn_rewards[0][-1] == pytest.approx(log.target_mass[0] * math.log((p[-1] + 0.1) / (p[0] + 0.1)))


def test_query_consensus_of_a_single_rollout_and_of_padding() -> None:
    batch = [query_rollout("a", "Paris", "capital"), Rollout("a", "Q a", [], [0], [0])]
    assert run(batch, siop_reward_mode="query_consensus").turn_rewards == [[0.0, 1.0], []]


def test_igpo_gold_is_the_only_reference() -> None:
    gold = ["Paris France", "Lutetia"]
    batch = [
        search_rollout("a", "Paris", ["Doc 1", "Doc 2"], gold=gold),
        search_rollout("a", None, ["Doc 3"], gold=gold),
        search_rollout("a", "lutetia", gold=gold),
    ]
    scorer = Scorer()
    rewards = run(batch, scorer, siop_use_gold_ref=True, siop_gain="prob", siop_lambda=0.9, siop_num_refs=3)
    assert scorer.cluster_calls == []
    assert scorer.entailment_calls == []
    assert [[r.text for r in request.references] for request in scorer.support_calls[0]] == [["Paris France"]] * 2
    p0, p1, p2, _ = rewards.support[0]
    assert rewards.turn_rewards[0] == pytest.approx([p1 - p0, p2 - p1, 2 / 3])
    p0, p1, _ = rewards.support[1]
    assert rewards.turn_rewards[1] == pytest.approx([p1 - p0, 0.0])
    assert rewards.turn_rewards[2] == [1.0]
    assert rewards.target_mass == [1.0] * 3
    assert group_metrics(rewards, batch, SiopConfig(siop_use_gold_ref=True))["siop/no_answer"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("boundary", "expected"),
    [("observation", [[0.0, 0.9, 1.0], [0.9, 1.0]]), ("before_answer", [[0.0, 0.0, 1.0], [0.0, 1.0]])],
)
def test_igpo_pays_a_search_for_its_own_result(boundary: str, expected: list[list[float]]) -> None:
    class Knows(Scorer):
        async def support(self, requests: Sequence[SupportRequest]) -> list[list[list[float]]]:
            texts = [[byte_tokenizer().decode(r.response_ids[:end]) for end in r.boundaries] for r in requests]
            return [[[math.log(0.95 if "It is Paris" in text else 0.05)] for text in of] for of in texts]

    found = ["nothing", "It is Paris."]
    batch = [search_rollout("a", "Paris", results, gold=["Paris"]) for results in (found, found[1:])]
    rewards = run(batch, Knows(), siop_use_gold_ref=True, siop_gain="prob", siop_boundary=boundary)
    assert [[pytest.approx(value) for value in row] for row in expected] == rewards.turn_rewards


@pytest.mark.parametrize("gold", [None, [], [" "]])
def test_igpo_without_a_label_is_refused(gold: list[str] | None) -> None:
    with pytest.raises(RolloutError, match="'a' has none"):
        run([search_rollout("a", "Paris", gold=gold)], siop_use_gold_ref=True)


@pytest.mark.parametrize("gold", ["Paris", [3]])
def test_labels_that_are_no_list_of_texts_are_refused(gold: Any) -> None:
    with pytest.raises(RolloutError, match="a list of texts, but a rollout of question 'a' has"):
        run([search_rollout("a", "Paris", gold=gold)], siop_use_gold_ref=True)


def test_labels_change_nothing_in_the_verifier_free_modes() -> None:
    for mode in ("process", "majority_binary", "cluster_frequency", "query_consensus"):
        labelled = mixed_batch()
        for item in labelled:
            item.gold = ["Lyon"]
        assert run(labelled, siop_reward_mode=mode) == run(mixed_batch(), siop_reward_mode=mode)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("siop_advantage_mode", "broadcast"),
        ("siop_enable_two_pass", False),
        ("siop_baseline", "turn_group"),
        ("siop_return", "min"),
        ("siop_turn_weight", 1.0),
        ("siop_scorer", "policy"),
        ("siop_scorer_url", "http://elsewhere:1"),
        ("siop_scorer_timeout_s", 1.0),
        ("siop_on_scorer_error", "drop_group"),
        ("siop_consensus_terminal", "support"),  # of another mode
        ("siop_import", "json"),
    ],
)
def test_keys_of_other_stages_change_no_turn_reward(key: str, value: Any) -> None:
    assert run(mixed_batch(), **{key: value}) == run(mixed_batch())


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Paris", "東京都", "Жуков 🙂", "it's 3.5 %", "word " * 499 + "word"])
def test_the_reference_tokens_are_exactly_its_own(text: str) -> None:
    tokenizer, config = byte_tokenizer(), SiopConfig(siop_reference_prefix="¿\n", siop_reference_suffix="!<|im_end|>")
    reference = build_reference(text, tokenizer, config)
    assert tokenizer.decode(reference.token_ids) == f"¿\n{text}!<|im_end|>"
    assert tokenizer.decode(reference.token_ids[reference.start : reference.end]) == text


def test_a_token_that_overlaps_the_reference_belongs_to_it() -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "a": 1, "(N": 2, "ic": 3, "e)": 4, "b": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"a|\(N|ic|e\)|b"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    config = SiopConfig(siop_reference_prefix="a(", siop_reference_suffix=")b")
    reference = build_reference("Nice", tokenizer, config)
    assert reference.token_ids == [1, 2, 3, 4, 5]
    assert (reference.start, reference.end) == (1, 4)


def test_a_reference_without_a_token_is_named() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Replace("\u200b", "")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    config = SiopConfig(siop_reference_prefix="a ", siop_reference_suffix=" a")
    with pytest.raises(RolloutError, match=r"'\\u200b' has no token"):
        build_reference("\u200b", tokenizer, config)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(RolloutError, match="Slow gives no character offsets"):
        build_reference("Paris", Slow(), SiopConfig())  # type: ignore[arg-type]


# --- edge cases -------------------------------------------------------------------------------------------------------


def metrics_of(batch: list[Rollout], rewards: GroupRewards, **keys: Any) -> dict[str, float]:
    return group_metrics(rewards, batch, SiopConfig(**keys))


def test_nobody_answers() -> None:
    batch, scorer = [search_rollout("a", None, ["Doc"]) for _ in range(3)], Scorer()
    rewards = run(batch, scorer)
    assert rewards.turn_rewards == [[]] * 3
    assert rewards.target_mass == [0.0] * 3
    assert rewards.cluster_ids == [None] * 3
    assert scorer.cluster_calls == []
    assert scorer.entailment_calls == scorer.support_calls == []
    found = metrics_of(batch, rewards)
    assert found["siop/no_answer"] == 1.0
    assert found["siop/zero_variance_groups"] == 1.0
    assert found["siop/clusters_per_group"] == 0.0
    absent = ("target_mass", "evidence", "support_first", "cluster_entropy", "turn_reward/mean")
    assert not {f"siop/{name}" for name in absent} & set(found)


def test_one_answers() -> None:
    batch, scorer = [search_rollout("a", answer, ["Doc"]) for answer in (None, "Paris", None)], Scorer()
    rewards = run(batch, scorer)
    assert scorer.cluster_calls == []
    assert rewards.target_mass == [0.0, 1.0, 0.0]
    assert rewards.cluster_ids == [None, 0, None]
    assert [len(turns) for turns in rewards.turn_rewards] == [0, 2, 0]


def test_all_agree() -> None:
    batch = [search_rollout("a", "Paris", ["Doc"]) for _ in range(4)]
    rewards = run(batch, siop_reward_mode="cluster_frequency")
    assert rewards.turn_rewards == [[0.0, 1.0]] * 4
    assert metrics_of(batch, rewards)["siop/zero_variance_groups"] == 1.0


@pytest.mark.parametrize("keys", [{"siop_baseline": "turn_index"}, {"siop_advantage_mode": "broadcast"}, {}])
def test_a_group_that_the_noise_floor_takes_to_zero_counts_as_zero_variance(keys: dict[str, Any]) -> None:
    # One rollout of eight differs by six times the noise; the standard deviation is less than five times it.
    batch = [search_rollout("a", "Paris", ["Doc"]) for _ in range(8)]
    rewards = replace(run(batch), turn_rewards=[[0.0, 6e-3 * (row == 0)] for row in range(8)])
    token_rewards = place_turn_rewards(rewards.turn_rewards, [torch.tensor(rollout.response_mask) for rollout in batch])
    mask = torch.tensor([rollout.response_mask for rollout in batch])
    keys = {**keys, "siop_scorer_noise": 1e-3}
    for scale in (True, False):
        advantages, _ = compute_siop_advantage(
            torch.stack(list(token_rewards)), mask, np.array(["a"] * 8), {**keys, "norm_adv_by_std_in_grpo": scale}
        )
        found = group_metrics(rewards, batch, SiopConfig(**keys), scale=scale)["siop/zero_variance_groups"]
        assert found == float(not advantages.any())


def test_a_group_counts_as_zero_variance_only_if_it_gives_no_update() -> None:
    batch = [search_rollout("a", "Paris", ["Doc"]) for _ in range(2)]
    rewards = replace(run(batch), turn_rewards=[[0.25, 0.5], [0.5, 0.25]])
    share = "siop/zero_variance_groups"
    assert metrics_of(batch, rewards)[share] == 0.0  # the second turns differ
    for keys in ({"siop_advantage_mode": "broadcast"}, {"siop_enable_two_pass": False}):
        assert metrics_of(batch, rewards, **keys)[share] == 1.0
    close = replace(rewards, turn_rewards=[[0.5, 0.5], [0.5, 0.500008]])
    assert metrics_of(batch, close)[share] == 1.0  # up to the scorer's noise
    assert metrics_of(batch, close, siop_baseline="pooled")[share] == 0.0  # has no such floor
    assert metrics_of(batch, close, siop_reward_mode="cluster_frequency")[share] == 0.0  # has no such noise
    rounded = replace(rewards, turn_rewards=[[0.25, 0.1 + 0.2], [0.25, 0.3]])
    assert metrics_of(batch, rounded, siop_reward_mode="cluster_frequency")[share] == 1.0
    for keys in ({"siop_advantage_mode": "broadcast"}, {"siop_enable_two_pass": False}):
        padded = [*batch, Rollout("a", "Q a", [], [0], [0])]
        assert metrics_of(padded, replace(run(padded), turn_rewards=[[0.5], [0.5], []]), **keys)[share] == 1.0
        assert metrics_of(batch[:1], replace(run(batch[:1]), turn_rewards=[[0.5]]), **keys)[share] == 0.0  # as GRPO
        assert metrics_of(batch[:1], replace(run(batch[:1]), turn_rewards=[[0.5]]))[share] == 1.0
    one = replace(rewards, turn_rewards=[[0.25, 0.5], []])
    assert metrics_of(batch, one)[share] == metrics_of(batch, one, siop_advantage_mode="broadcast")[share] == 0.0


def test_target_mass_is_that_of_rollouts_with_a_cluster() -> None:
    batch = query_batch()
    rewards = run(batch, siop_reward_mode="query_consensus")
    assert all(rewards.turn_rewards) and None in rewards.cluster_ids
    targets = [q for q, cluster in zip(rewards.target_mass, rewards.cluster_ids, strict=True) if cluster is not None]
    found = metrics_of(batch, rewards, siop_reward_mode="query_consensus")
    assert found["siop/target_mass"] == pytest.approx(sum(targets) / len(targets))
    without = replace(rewards, cluster_ids=[None] * len(batch))
    assert not {name for name in metrics_of(batch, without) if "cluster" in name or "target" in name}


def test_an_empty_batch() -> None:
    assert run([]).turn_rewards == []
    assert metrics_of([], run([])) == {"siop/groups": 0.0}


def test_a_padded_row_gets_nothing() -> None:
    batch = [search_rollout("a", "Paris", ["Doc"]), Rollout("a", "Q a", [], [0, 0, 0], [0, 0, 0])]
    for keys in ({}, {"siop_use_gold_ref": True}):
        for item in batch:
            item.gold = ["Paris"]
        rewards = run(batch, **keys)
        assert rewards.turn_rewards[1] == []
        assert rewards.target_mass[1] == 0.0


def test_only_the_first_2000_characters_of_an_observation_count() -> None:
    scorer = Scorer()
    batch = [search_rollout("a", "Paris", ["x" * 5000]), search_rollout("a", "Lyon", ["x" * 2500])]
    run(batch, scorer)
    assert OBSERVATION_CHARACTERS == 2000
    assert scorer.entailment_calls == [[("x" * 2000, "Paris"), ("x" * 2000, "Lyon")]]


def test_a_tool_call_in_the_last_turn_and_a_truncated_one() -> None:
    batch = [
        rollout(
            "a", ["<tool_call>x</tool_call>", "<answer>Paris</answer><tool_call>y</tool_call>"], [tool_result("D")]
        ),
        rollout("a", ["<tool_call>x</tool_call>", "<answer>Par"], [tool_result("D")]),
        rollout("a", ["<tool_call>x</tool_call>"], [tool_result("<answer>Paris</answer>")]),
    ]
    assert run(batch).answers == ["Paris", "", ""]


def test_answers_in_other_scripts_and_of_many_words() -> None:
    long = " ".join(f"word{n}" for n in range(500))
    rewards = run([search_rollout("a", answer, ["Doc"]) for answer in ("東京", "東京", "القاهرة", long)])
    assert rewards.references == [["東京"], ["東京"], ["القاهرة"], [long]]
    assert rewards.cluster_ids == [0, 0, 1, 2]


def test_references_that_differ_in_white_space() -> None:
    rewards = run([search_rollout("a", answer) for answer in ("New York", "New  York", "  New York\n", "new york")])
    assert rewards.references[0] == ["New York", "New  York", "new york"]
    assert rewards.target_mass == [1.0] * 4


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["one", "two", "Two", None]), st.integers(0, 3)), max_size=9
    ),
    st.randoms(use_true_random=False),
)
def test_targets_sum_to_one_and_questions_are_independent(
    drawn: list[tuple[str, str | None, int]], random: Any
) -> None:
    batch = [search_rollout(uid, answer, [f"Doc {n}" for n in range(turns)]) for uid, answer, turns in drawn]
    rewards = run(batch)
    for uid in {item.uid for item in batch}:
        members = [n for n, item in enumerate(batch) if item.uid == uid]
        targets = {
            rewards.cluster_ids[n]: rewards.target_mass[n] for n in members if rewards.cluster_ids[n] is not None
        }
        assert not targets or math.fsum(targets.values()) == pytest.approx(1.0)
        alone = run([batch[n] for n in members])  # bit for bit, whatever else is in the batch
        assert alone.turn_rewards == [rewards.turn_rewards[n] for n in members]
    for item, turns in zip(batch, rewards.turn_rewards, strict=True):
        assert len(turns) in (0, len(get_assistant_turn_ranges(item.response_mask)))
    placed = place_turn_rewards(rewards.turn_rewards, [item.response_mask for item in batch])
    for row, turns in zip(placed, rewards.turn_rewards, strict=True):
        assert float(row.sum()) == pytest.approx(math.fsum(turns), abs=1e-6)


def test_rewards_telescope_with_lambda_one() -> None:
    prob, peak = run(mixed_batch(), siop_gain="prob", siop_lambda=1.0), run(mixed_batch(), siop_lambda=1.0)
    for rewards, end in ((prob, lambda support: support[-1]), (peak, max)):
        for turns, support, q in zip(rewards.turn_rewards, rewards.support, rewards.target_mass, strict=True):
            if support:
                assert math.fsum(turns) == pytest.approx(q * (end(support) - support[0]))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_malformed_rollouts_are_named() -> None:
    with pytest.raises(RolloutError, match="'a': 3 response tokens, but a mask of 2"):
        run([Rollout("a", "Q", [1], [1, 2, 3], [1, 1])])
    with pytest.raises(RolloutError, match="'a' has two different questions"):
        run([Rollout("a", "Q1", [1], [1], [1]), Rollout("a", "Q2", [1], [1], [1])])


class Wrong(Scorer):
    """Right, but for one answer."""

    def __init__(self, method: str, change: Any) -> None:
        super().__init__()
        self.method, self.change = method, change

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        result = await super().cluster(question, answers)
        return self.change(result) if self.method == "cluster" else result

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        result = await super().entailment(pairs)
        return self.change(result) if self.method == "entailment" else result

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        result = await super().support(rollouts)
        return self.change(result) if self.method == "support" else result


def with_first(value: Any) -> Any:
    return lambda items: [value, *items[1:]]


def with_first_log_prob(value: Any) -> Any:
    return lambda items: [[[value, *items[0][0][1:]], *items[0][1:]], *items[1:]]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("cluster", lambda ids: ids[:-1], r"answers sent, \d cluster ids returned"),
        ("cluster", with_first("0"), "whole numbers, got '0'"),
        ("cluster", with_first(None), "whole numbers, got None"),
        ("cluster", with_first(True), "whole numbers, got True"),
        ("entailment", lambda scores: [*scores, 0.5], "5 pairs sent, 6 scores returned"),
        ("entailment", with_first(1.01), "from 0.0 to 1.0, got 1.01"),
        ("entailment", with_first(-0.01), "got -0.01"),
        ("entailment", with_first(math.nan), "got nan"),
        ("entailment", with_first(None), "got None"),
        ("support", lambda log_probs: log_probs[1:], "5 rollouts sent, 4 returned"),
        ("support", lambda log_probs: [log_probs[0][1:], *log_probs[1:]], "4 boundaries sent, 3 returned"),
        ("support", lambda log_probs: [[[-1.0], *log_probs[0][1:]], *log_probs[1:]], "2 references sent, 1 returned"),
        ("support", with_first_log_prob(0.1), "'a' at boundary 0 must be a finite number from -inf to 0.001, got 0.1"),
        ("support", with_first_log_prob(-math.inf), "got -inf"),
        ("support", with_first_log_prob(math.nan), "got nan"),
        ("support", with_first_log_prob(None), "got None"),
        ("support", with_first_log_prob(-(10**400)), "must be a finite number"),
        ("cluster", lambda ids: None, "answers sent, which gives a list of .*, got None"),
        ("cluster", lambda ids: "0" * len(ids), "which gives a list"),
        ("entailment", lambda scores: iter(scores), "5 pairs sent, which gives a list of 5, got <list_iterator"),
        ("entailment", with_first(10**400), "must be a finite number"),
        ("support", lambda log_probs: None, "5 rollouts sent, which gives a list of 5, got None"),
        ("support", with_first(None), "4 boundaries sent, which gives a list of 4, got None"),
        ("support", with_first([0.5] * 4), "2 references sent, which gives a list of 2, got 0.5"),
    ],
)
def test_a_scorer_that_answers_wrongly_is_an_error(method: str, change: Any, message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        run(mixed_batch(), Wrong(method, change))


def test_numpy_numbers_of_a_scorer_are_numbers() -> None:
    import numpy as np

    as_numpy = Wrong("cluster", lambda ids: list(np.array(ids)))
    assert run(mixed_batch(), as_numpy) == run(mixed_batch())
    half = Wrong("entailment", lambda scores: list(np.array(scores, dtype=np.float32)))
    assert run(mixed_batch(), half).target_mass == pytest.approx(run(mixed_batch()).target_mass, abs=1e-6)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_group_metrics() -> None:
    batch = mixed_batch()
    rewards = run(batch)
    found = metrics_of(batch, rewards)
    assert found["siop/groups"] == 2
    assert found["siop/clusters_per_group"] == 2.0
    assert found["siop/cluster_entropy"] == pytest.approx((0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / 2)
    assert found["siop/no_answer"] == pytest.approx(1 / 7)
    assert found["siop/turns/mean"] == pytest.approx(17 / 7)
    assert found["siop/zero_variance_groups"] == 0.0
    assert found["siop/target_mass"] == pytest.approx(sum(rewards.target_mass) / 6)
    assert found["siop/evidence"] == pytest.approx(sum(rho for rho in rewards.evidence if rho is not None) / 4)
    supports = [support for support in rewards.support if support]
    assert found["siop/support_first"] == pytest.approx(sum(support[0] for support in supports) / 5)
    assert found["siop/support_last"] == pytest.approx(sum(support[-1] for support in supports) / 5)
    every = [reward for turns in rewards.turn_rewards for reward in turns]
    assert found["siop/turn_reward/mean"] == pytest.approx(sum(every) / 15)
    assert found["siop/turn_reward/turn_4/mean"] == rewards.turn_rewards[3][3]
    assert "siop/turn_reward/turn_4/std" not in found
    assert found["siop/return_to_go/turn_4/mean"] == rewards.turn_rewards[3][3]
    with_three = [rewards.turn_rewards[n] for n in (0, 3, 6)]
    values = [math.fsum(turns[2:]) for turns in with_three]
    assert found["siop/return_to_go/turn_3/mean"] == pytest.approx(sum(values) / 3)
    assert found["siop/return_to_go/turn_3/std"] == pytest.approx(statistics.stdev(values))
    discounted = group_metrics(rewards, batch, SiopConfig(), gamma=0.5)
    values = [turns[2] + 0.5 * (turns[3] if len(turns) > 3 else 0.0) for turns in with_three]
    assert discounted["siop/return_to_go/turn_3/mean"] == pytest.approx(sum(values) / 3)
    lowest = metrics_of(batch, rewards, siop_return="min")
    assert lowest["siop/return_to_go/turn_3/mean"] == pytest.approx(sum(min(turns[2:]) for turns in with_three) / 3)
    assert {name for name in found if found[name] != lowest[name]} <= {n for n in found if "return_to_go" in n}
    assert "siop/turn_reward/turn_5/mean" not in found
    a, b = (turns[2] for turns in (rewards.turn_rewards[0], rewards.turn_rewards[6]))
    c = rewards.turn_rewards[3][2]
    mean = (a + b + c) / 3
    spread = math.sqrt(sum((x - mean) ** 2 for x in (a, b, c)) / 2)
    assert found["siop/turn_reward/turn_3/std"] == pytest.approx(spread)
    assert all(isinstance(value, float) for value in found.values())
