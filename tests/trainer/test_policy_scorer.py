"""``siop_scorer=policy``: what the actor is asked for, and what is made of its log-probs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from method_helpers import Scorer, byte_tokenizer, run, search_rollout
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from tiny_models import VOCAB_SIZE, tiny_causal_lm
from verl.protocol import BatchData
from verl.trainer.siop import policy_scorer as module
from verl.trainer.siop.policy_scorer import PolicyScorer
from verl.trainer.siop.scoring import measure_noise
from verl.utils import tensordict_utils as tu
from verl.utils.siop.errors import ScorerError
from verl.utils.siop.siop_process_reward import Reference, SiopConfig, SupportRequest

DYNAMIC = OmegaConf.create({"log_prob_use_dynamic_bsz": True, "log_prob_max_token_len_per_gpu": 100})


class Actor:
    """verl's actor worker group: splits a batch over ranks as verl does, and scores rows with a small model."""

    def __init__(self, ranks: int = 1, model: Any = None) -> None:
        self.ranks, self.model = ranks, model or tiny_causal_lm()
        self.calls: list[TensorDict] = []

    def _query_dispatch_info(self, mesh: str) -> list[int]:
        assert mesh == "actor"
        return list(range(self.ranks))

    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        self.calls.append(data)
        return BatchData([self._rank(part) for part in BatchData(data).chunk(self.ranks)]).concat()

    @torch.inference_mode()
    def _rank(self, data: TensorDict) -> TensorDict:
        assert tu.get(data, "compute_loss") is False and tu.get(data, "calculate_entropy") is False
        assert data["loss_mask"].sum() == data["input_ids"].offsets()[-1]
        rows = []
        for ids, positions in zip(data["input_ids"].unbind(), data["position_ids"].unbind(), strict=True):
            logits = self.model(input_ids=ids[None], position_ids=positions[None]).logits[0] / data["temperature"]
            rows.append(logits.log_softmax(-1).gather(-1, ids.roll(-1)[:, None])[:, 0])
        return tu.get_tensordict({"log_probs": _jagged(rows)}, {"metrics": {}})


class BrokenActor(Actor):
    """Changes the log-probs of the rows that it was asked for."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        rows = self.change(list(super().compute_log_prob(data)["log_probs"].unbind()))
        return tu.get_tensordict({"log_probs": _jagged(rows)} if rows else {}, {"metrics": {}})


def _jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _ids(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _requests() -> list[SupportRequest]:
    """Two questions with rollouts of unequal lengths, references that share tokens, and a question of one rollout."""
    prompts = [_ids(7, 1), _ids(11, 2)]
    references = [Reference("a", _ids(6, 3), 2, 5), Reference("b", _ids(6, 3)[:2] + _ids(9, 4), 2, 7)]
    return [
        SupportRequest(prompts[0], _ids(20, 5), [0, 6, 15], references),
        SupportRequest(prompts[0], _ids(31, 6), [0, 9, 20, 31], references),
        SupportRequest(prompts[1], _ids(4, 7), [0, 4, 4], references[:1]),
    ]


def _support(actor: Any, requests: list[SupportRequest], rollout: DictConfig = DYNAMIC) -> list[list[list[float]]]:
    return asyncio.run(PolicyScorer(Scorer(), actor, rollout).support(requests))


@torch.inference_mode()
def _one_by_one(model: Any, requests: list[SupportRequest]) -> list[list[list[float]]]:
    """Every score from a forward pass of its own."""

    def score(request: SupportRequest, boundary: int, reference: Reference) -> float:
        context = request.prompt_ids + request.response_ids[:boundary]
        ids = torch.tensor(context + reference.token_ids)
        log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(context) + reference.start, len(context) + reference.end)
        return float(log_probs[at - 1, ids[at]].mean())

    return [[[score(r, b, reference) for reference in r.references] for b in r.boundaries] for r in requests]


def _flat(support: list[list[list[float]]]) -> list[float]:
    return [score for rollout in support for boundary in rollout for score in boundary]


FIXED = OmegaConf.create({"log_prob_use_dynamic_bsz": False, "log_prob_micro_batch_size_per_gpu": 4})


@pytest.mark.parametrize(("ranks", "rollout"), [(1, DYNAMIC), (3, DYNAMIC), (1, FIXED), (2, FIXED), (16, DYNAMIC)])
def test_scores_are_those_of_separate_forward_passes(ranks: int, rollout: DictConfig) -> None:
    actor, requests = Actor(ranks), _requests()
    support = _support(actor, requests, rollout)
    assert [[len(row) for row in rows] for rows in support] == [[2] * 3, [2] * 4, [1] * 3]
    assert _flat(support) == pytest.approx(_flat(_one_by_one(actor.model, requests)), abs=1e-5)
    (call,) = actor.calls
    assert len(call) % (ranks * rollout.get("log_prob_micro_batch_size_per_gpu", 1)) == 0
    assert ("max_token_len_per_gpu" in call) == rollout.log_prob_use_dynamic_bsz
    if rollout.log_prob_use_dynamic_bsz:
        # A rollout of verl's longest length and the longest probe still fit.
        assert call["max_token_len_per_gpu"] == 100 + 7


def test_every_distinct_sequence_is_computed_once() -> None:
    actor, requests = Actor(), _requests()
    scorer = PolicyScorer(Scorer(), actor, DYNAMIC)
    asyncio.run(scorer.support(requests + requests))
    rows = [tuple(row.tolist()) for row in actor.calls[0]["input_ids"].unbind()]
    # 3·2 + 4·2 + 3 pairs; the prompt alone is the same for both rollouts of a question, and a boundary is there twice.
    assert len(rows) == len(set(rows)) == 17 - 2 - 1
    assert scorer.computed_tokens == sum(map(len, rows))
    assert scorer.requested_tokens == 2 * sum(
        len(r.prompt_ids) + b + len(reference.token_ids)
        for r in requests
        for b in r.boundaries
        for reference in r.references
    )


@pytest.mark.parametrize("noise", [0.0, 4e-3])
def test_the_noise_of_the_policy_can_be_measured(noise: float) -> None:
    class Rounding(Actor):
        """Gives a little more where it scores several sequences at once."""

        def compute_log_prob(self, data: TensorDict) -> TensorDict:
            rows = super().compute_log_prob(data)["log_probs"].unbind()
            more = noise * (len(rows) > 1)
            return tu.get_tensordict({"log_probs": _jagged([row + more for row in rows])}, {"metrics": {}})

    actor = Rounding(model=tiny_causal_lm(max_position_embeddings=1024))
    scorer = PolicyScorer(Scorer(), actor, DYNAMIC)
    found = asyncio.run(measure_noise(scorer, byte_tokenizer(), SiopConfig(), "where is the tower ?"))
    assert found == pytest.approx(noise, abs=1e-5)
    assert len(actor.calls) == 6  # five texts alone, then all of them


def test_balancing_and_padding_put_the_same_work_on_every_rank() -> None:
    actor = Actor(2)
    _support(actor, _requests()[:1] * 3 + _requests()[2:])
    first, second = (part["input_ids"].offsets()[-1].item() for part in BatchData(actor.calls[0]).chunk(2))
    assert abs(first - second) < 10


def test_temperature_of_sampling_does_not_matter() -> None:
    actor = Actor()
    _support(actor, _requests(), OmegaConf.create({**DYNAMIC, "temperature": 0.5}))
    assert actor.calls[0]["temperature"] == 1.0


def test_a_large_batch_goes_in_several_calls_that_keep_questions_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RANK_TOKENS", 100)
    actor, requests = Actor(2), _requests()
    assert _flat(_support(actor, requests)) == pytest.approx(_flat(_one_by_one(actor.model, requests)), abs=1e-5)
    assert [len(call) for call in actor.calls] == [12, 2]
    assert _support(actor, []) == []
    assert len(actor.calls) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [rows[0] * float("nan"), *rows[1:]],
            "no finite log-prob for each of the 3 tokens of .*'a'",
        ),
        (lambda rows: [rows[0] - float("inf"), *rows[1:]], "no finite log-prob"),
        (lambda rows: rows[1:], "asked for log-probs of 14 sequences and did not return them"),
        (lambda rows: [row[1:] for row in rows], "did not return them"),
        (lambda rows: [], "did not return them"),
    ],
)
def test_what_the_actor_does_not_give_is_an_error(change: Any, message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        _support(BrokenActor(change), _requests())


def test_a_reference_without_any_token_before_it_is_an_error() -> None:
    with pytest.raises(ScorerError, match="no finite log-prob for each of the 2 tokens"):
        _support(Actor(), [SupportRequest([], [1, 2], [0], [Reference("a", [3, 4], 0, 2)])])


def test_padding_rows_are_never_read() -> None:
    class Padded(Actor):
        def compute_log_prob(self, data: TensorDict) -> TensorDict:
            rows = list(super().compute_log_prob(data)["log_probs"].unbind())
            seen: set[tuple[int, ...]] = set()
            for index, ids in enumerate(tuple(row.tolist()) for row in data["input_ids"].unbind()):
                if ids in seen:
                    rows[index] = rows[index] * float("nan")
                seen.add(ids)
            assert len(seen) == 14 < len(rows) == 16
            return tu.get_tensordict({"log_probs": _jagged(rows)}, {"metrics": {}})

    actor = Padded(4)
    assert _flat(_support(actor, _requests())) == pytest.approx(_flat(_one_by_one(actor.model, _requests())), abs=1e-5)


def test_the_method_takes_clusters_and_evidence_from_the_scorer_and_support_from_the_policy() -> None:
    rollouts = [
        search_rollout("a", "x", ["x is here", "and there"]),
        search_rollout("a", "yy", ["nothing"]),
        search_rollout("a", None, ["x is here"]),
        search_rollout("b", "z", ["z"]),  # K = 1
        search_rollout("c", None, []),
        search_rollout("d", "one turn"),
    ]
    nli, actor = Scorer(), Actor(2, tiny_causal_lm(max_position_embeddings=1024))
    rewards = run(rollouts, scorer=PolicyScorer(nli, actor, DYNAMIC))
    expected = run(rollouts)
    assert rewards.cluster_ids == expected.cluster_ids and rewards.target_mass == expected.target_mass
    assert nli.support_calls == [] and nli.cluster_calls and nli.entailment_calls
    assert [len(support) for support in rewards.support] == [4, 3, 0, 3, 0, 0]
    assert [len(values) for values in rewards.turn_rewards] == [3, 2, 0, 2, 0, 1]
    assert len(actor.calls) == 1
    nothing = run([search_rollout("a", None)], scorer=PolicyScorer(nli, actor, DYNAMIC))
    assert nothing.turn_rewards == [[]] and len(actor.calls) == 1
