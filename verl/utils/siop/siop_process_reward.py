"""Turn rewards without a verifier: rollouts → clusters → target → support → turn rewards.

One small function per credit method (SIOP, TTRL, EMPO, IGPO); they share the cluster pass. Nothing here knows how the
scorer answers: any object with the three coroutines of :class:`SiopScorer` will do.
Source: Self-Induced Outcome Potential (arXiv 2605.04984).
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from verl.utils.reward_score.siop_reward import f1_score
from verl.utils.siop.errors import RolloutError, ScorerError, SiopConfigError
from verl.utils.siop.turn_utils import (
    BOUNDARY_MODES,
    boundaries,
    extract_answer,
    extract_observations,
    get_assistant_turn_ranges,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OBSERVATION_CHARACTERS = 2000
# Log-probs are at most 0; a scorer in half precision may round a probability of 1 to slightly above.
LOG_PROB_TOLERANCE = 1e-3


# --- configuration ----------------------------------------------------------------------------------------------------


def _choice(*values: str) -> Any:
    return field(default=values[0], metadata={"choices": values})


def _number(default: float, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass(frozen=True)
class SiopConfig:
    """The ``algorithm.siop_*`` keys, validated when built. The first value of each choice is the default.

    Raises:
        SiopConfigError: an unknown key, a wrong type, a value out of range or an impossible combination; the message
            names the key, the value and what is allowed.
    """

    siop_reward_mode: str = _choice("process", "majority_binary", "cluster_frequency")
    siop_use_gold_ref: bool = False
    siop_advantage_mode: str = _choice("turn_level", "broadcast")
    siop_enable_two_pass: bool = True
    siop_baseline: str = _choice("leave_one_out", "pooled")
    siop_boundary: str = _choice(*BOUNDARY_MODES)
    siop_gain: str = _choice("prob", "log")
    siop_lambda: float = _number(0.5, 0.0, 1.0)
    siop_eta: float = _number(1.0, 0.0)
    siop_num_refs: int = _number(3, 1)
    siop_epsilon: float = _number(1e-8, 0.0, above=True)
    siop_strict_entailment: bool = True
    siop_reference_prefix: str = "\nNow there's enough information to answer\n</think>\n<answer>\n"
    siop_reference_suffix: str = "\n</answer><|im_end|>"
    siop_scorer: str = _choice("server", "policy")
    siop_scorer_url: str = "http://127.0.0.1:8390"
    siop_scorer_timeout_s: float = _number(600.0, 0.0, above=True)
    siop_on_scorer_error: str = _choice("raise", "drop_group")

    def __new__(cls, **values: Any) -> SiopConfig:
        # Before the generated __init__ can answer an unknown key with a bare TypeError.
        known = [spec.name for spec in dataclasses.fields(cls)]
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise SiopConfigError(f"unknown key {key}={value!r}{hint} Allowed keys: {', '.join(sorted(known))}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _validated(spec, getattr(self, spec.name)))
        if not self.siop_scorer_url.startswith(("http://", "https://")):
            raise SiopConfigError(
                f"siop_scorer_url={self.siop_scorer_url!r} is not allowed; an address starts with http:// or https://"
            )
        if self.siop_use_gold_ref and self.siop_reward_mode != "process":
            raise SiopConfigError(
                f"siop_use_gold_ref=True is not allowed with siop_reward_mode={self.siop_reward_mode!r}: the gold "
                "answer replaces the clusters that this mode counts. Use siop_reward_mode='process' with it"
            )

    @classmethod
    def from_algorithm(cls, algorithm: Mapping[Any, Any] | None) -> SiopConfig:
        """The ``siop_*`` keys of verl's ``algorithm`` section; those that are missing take their default.

        Args:
            algorithm: a DictConfig, a dict or verl's AlgoConfig; None gives the defaults.

        Raises:
            SiopConfigError: see the class.
        """
        keys = [str(key) for key in algorithm or () if str(key).startswith("siop_")]
        return cls(**{key: algorithm[key] for key in keys}) if algorithm is not None else cls()


def _validated(spec: dataclasses.Field[Any], value: Any) -> Any:
    """The value, a number as its declared type; SiopConfigError if it is not allowed."""

    def refuse(allowed: str) -> SiopConfigError:
        return SiopConfigError(f"{spec.name}={value!r} is not allowed; choose {allowed}")

    if spec.type == "bool":
        if not isinstance(value, bool):
            raise refuse("true or false")
    elif "choices" in spec.metadata:
        choices = spec.metadata["choices"]
        if not isinstance(value, str) or value not in choices:
            raise refuse(("one of " if len(choices) > 1 else "") + ", ".join(choices))
    elif spec.type == "str":
        if not isinstance(value, str):
            raise refuse("a text")
    else:
        low, high, above = (spec.metadata[name] for name in ("low", "high", "above"))
        kind = "a whole number" if spec.type == "int" else "a number"
        wanted = f"{kind} {'above' if above else 'from'} {low}" + (f" to {high}" if math.isfinite(high) else "")
        accepted = numbers.Integral if spec.type == "int" else numbers.Real
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise refuse(wanted)
        number = float(value)
        if not math.isfinite(number) or not low <= number <= high or (above and number == low):
            raise refuse(wanted)
        return int(number) if spec.type == "int" else number
    return value


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One sampled answer to a question.

    Args:
        uid: the question's group; rollouts with the same uid form a group, in list order.
        question: the bare user question, without chat template.
        prompt_ids: tokens of the rendered prompt, without padding.
        response_ids: L tokens: assistant turns and tool observations.
        response_mask: L values, 1 on the tokens that the policy sampled.
        gold: gold answers; used by ``siop_use_gold_ref`` only.
    """

    uid: str
    question: str
    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    gold: list[str] | None = None


@dataclass(frozen=True)
class Reference:
    """A reference answer as a probe: ``token_ids`` follow a prefix, the mean runs over ``token_ids[start:end]``."""

    text: str
    token_ids: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class SupportRequest:
    """One rollout to be scored: every reference after ``prompt_ids + response_ids[:boundary]`` for every boundary."""

    prompt_ids: list[int]
    response_ids: list[int]
    boundaries: list[int]
    references: list[Reference]


class SiopScorer(Protocol):
    """What the method asks of a scorer. Every call answers all of its input or raises; it never makes up a value."""

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        """Cluster ids of one question's answers, given in rollout order."""
        ...

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        """P(premise entails hypothesis) of each (premise, hypothesis)."""
        ...

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        """Mean log-prob of the reference's own tokens, [rollout][boundary][reference]."""
        ...


@dataclass
class GroupRewards:
    """What the method found, one entry per rollout in the order given; for rollouts without an answer see each field.

    Args:
        turn_rewards: T rewards; empty if the rollout gets none (it has no answer).
        target_mass: target q of the rollout's cluster; 0 without an answer.
        references: reference texts of the rollout's cluster; empty without an answer.
        cluster_ids: the scorer's cluster id; None without an answer, or if the method needs no clusters.
        support: p_t at the T + 1 boundaries; empty where it was not needed.
        answers: final answer; empty if there is none.
        evidence: rho of the rollout's cluster; None where it was not needed.
    """

    turn_rewards: list[list[float]]
    target_mass: list[float]
    references: list[list[str]]
    cluster_ids: list[int | None]
    support: list[list[float]]
    answers: list[str] = field(default_factory=list)
    evidence: list[float | None] = field(default_factory=list)


@dataclass
class _Parsed:
    """A rollout with its turns and its answer."""

    rollout: Rollout
    turns: list[tuple[int, int]]
    answer: str


@dataclass
class _Cluster:
    """Answers of one question that mean the same; ``members`` index the batch, in rollout order."""

    cluster_id: int
    members: list[int]
    references: list[str]
    mass: float
    target: float = 0.0
    evidence: float | None = None


# --- the pass that the methods share ----------------------------------------------------------------------------------


def _parse(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> _Parsed:
    if len(rollout.response_ids) != len(rollout.response_mask):
        raise RolloutError(
            f"rollout of question {rollout.uid!r}: {len(rollout.response_ids)} response tokens, "
            f"but a mask of {len(rollout.response_mask)}"
        )
    turns = get_assistant_turn_ranges(rollout.response_mask)
    return _Parsed(rollout, turns, extract_answer(rollout.response_ids, turns, tokenizer))


def _group_by_question(parsed: Sequence[_Parsed]) -> list[list[int]]:
    """Indices of the rollouts of each question, in list order."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(parsed):
        group = groups.setdefault(item.rollout.uid, [])
        group.append(index)
        first = parsed[group[0]].rollout.question
        if item.rollout.question != first:
            raise RolloutError(
                f"uid {item.rollout.uid!r} has two different questions: {first!r} and {item.rollout.question!r}"
            )
    return list(groups.values())


async def _cluster_question(
    parsed: Sequence[_Parsed], members: Sequence[int], num_refs: int, scorer: SiopScorer
) -> list[_Cluster]:
    """Clusters of one question in the order in which its rollouts open them; mass m(c) = |c| / K_valid."""
    valid = [index for index in members if parsed[index].answer]
    answers = [parsed[index].answer for index in valid]
    if len(answers) > 1:
        question = parsed[valid[0]].rollout.question
        ids = _checked_cluster_ids(await scorer.cluster(question, answers), question, len(answers))
    else:
        ids = [0] * len(answers)
    by_id: dict[int, list[int]] = {}
    for index, cluster_id in zip(valid, ids, strict=True):
        by_id.setdefault(cluster_id, []).append(index)
    return [
        _Cluster(
            cluster_id=cluster_id,
            members=indices,
            references=list(dict.fromkeys(parsed[index].answer for index in indices))[:num_refs],
            mass=len(indices) / len(valid),
        )
        for cluster_id, indices in by_id.items()
    ]


async def _cluster_pass(parsed: Sequence[_Parsed], config: SiopConfig, scorer: SiopScorer) -> list[list[_Cluster]]:
    """Clusters of every question; the questions are asked concurrently."""
    tasks = [
        asyncio.ensure_future(_cluster_question(parsed, members, config.siop_num_refs, scorer))
        for members in _group_by_question(parsed)
    ]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # one has failed: the others need not go on
            task.cancel()


def _checked_cluster_ids(ids: Sequence[int], question: str, expected: int) -> list[int]:
    if len(ids) != expected:
        raise ScorerError(f"cluster of {question!r}: {expected} answers sent, {len(ids)} cluster ids returned")
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ScorerError(f"cluster of {question!r}: cluster ids are whole numbers, got {value!r}")
    return [int(value) for value in ids]


def _checked_number(value: float, what: str, low: float, high: float) -> float:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ScorerError(f"{what} must be a finite number from {low} to {high}, got {value!r}")
    return float(value)


# --- target and support -----------------------------------------------------------------------------------------------


async def _set_evidence(
    parsed: Sequence[_Parsed],
    clusters: Sequence[_Cluster],
    tokenizer: PreTrainedTokenizerBase,
    scorer: SiopScorer,
) -> None:
    """Set rho(c): mean over members with observations of the mean over their observations of P(o entails reference).

    The reference is the cluster's first; of an observation the first 2,000 characters count; 0 if there is none.
    One call for all, each distinct pair once.
    """
    pairs: dict[tuple[str, str], None] = {}
    pairs_of_member: dict[int, list[tuple[str, str]]] = {}
    for cluster in clusters:
        for index in cluster.members:
            observations = extract_observations(parsed[index].rollout.response_ids, parsed[index].turns, tokenizer)
            member_pairs = [(text[:OBSERVATION_CHARACTERS], cluster.references[0]) for text in observations]
            pairs_of_member[index] = member_pairs
            pairs.update(dict.fromkeys(member_pairs))
    scores: list[float] = await scorer.entailment(list(pairs)) if pairs else []
    if len(scores) != len(pairs):
        raise ScorerError(f"entailment: {len(pairs)} pairs sent, {len(scores)} scores returned")
    score_of = {
        pair: _checked_number(score, f"entailment of hypothesis {pair[1]!r}", 0.0, 1.0)
        for pair, score in zip(pairs, scores, strict=True)
    }
    for cluster in clusters:
        means = [
            _mean([score_of[pair] for pair in pairs_of_member[index]])
            for index in cluster.members
            if pairs_of_member[index]
        ]
        cluster.evidence = _mean(means) if means else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


async def _set_targets(
    parsed: Sequence[_Parsed],
    questions: Sequence[Sequence[_Cluster]],
    tokenizer: PreTrainedTokenizerBase,
    config: SiopConfig,
    scorer: SiopScorer,
) -> None:
    """Set q(c) ∝ m(c)·exp(eta·rho(c)), normalised over the question's clusters; q = m where evidence cannot matter."""
    contested = [cluster for clusters in questions if len(clusters) > 1 for cluster in clusters]
    if config.siop_eta > 0:
        await _set_evidence(parsed, contested, tokenizer, scorer)
    for clusters in questions:
        # Relative to the strongest evidence, so that a large eta cannot overflow.
        top = max((cluster.evidence or 0.0 for cluster in clusters), default=0.0)
        weights = [c.mass * math.exp(config.siop_eta * ((c.evidence or 0.0) - top)) for c in clusters]
        total = math.fsum(weights)
        for cluster, weight in zip(clusters, weights, strict=True):
            cluster.target = weight / total


def build_reference(text: str, tokenizer: PreTrainedTokenizerBase, config: SiopConfig) -> Reference:
    """Probe of a reference: ``prefix + text + suffix`` tokenised alone, and which of its tokens are the reference's.

    A token that overlaps the reference's characters belongs to it, also if it starts before or ends after them.

    Raises:
        RolloutError: no token overlaps the reference, or the tokenizer gives no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise RolloutError(f"the tokenizer {type(tokenizer).__name__} gives no character offsets; use a fast tokenizer")
    first, last = len(config.siop_reference_prefix), len(config.siop_reference_prefix) + len(text)
    encoded = tokenizer(
        config.siop_reference_prefix + text + config.siop_reference_suffix,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
    )
    inside = [
        position
        for position, (start, end) in enumerate(encoded["offset_mapping"])
        if start < end and start < last and end > first
    ]
    if not inside:
        raise RolloutError(f"reference {text!r} has no token of its own in the probe text")
    return Reference(text=text, token_ids=list(encoded["input_ids"]), start=inside[0], end=inside[-1] + 1)


async def _supports(
    parsed: Sequence[_Parsed],
    references_of: Mapping[int, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    config: SiopConfig,
    scorer: SiopScorer,
) -> dict[int, list[float]]:
    """Support p_t = Σ_r alpha_r · exp(mean log-prob of reference r), alpha uniform, of each rollout given references.

    One call for all. A rollout with one turn has no support: its only reward is the terminal one.

    Returns:
        Rollout index -> p at its T + 1 boundaries.
    """
    indices = [index for index in sorted(references_of) if len(parsed[index].turns) > 1]
    texts = dict.fromkeys(text for index in indices for text in references_of[index])
    probes = {text: build_reference(text, tokenizer, config) for text in texts}
    requests = [
        SupportRequest(
            prompt_ids=list(parsed[index].rollout.prompt_ids),
            response_ids=list(parsed[index].rollout.response_ids),
            boundaries=boundaries(parsed[index].turns, config.siop_boundary),
            references=[probes[text] for text in references_of[index]],
        )
        for index in indices
    ]
    log_probs = await scorer.support(requests) if requests else []
    if len(log_probs) != len(requests):
        raise ScorerError(f"support: {len(requests)} rollouts sent, {len(log_probs)} returned")
    return {
        index: _probabilities(log_probs_TR, request, parsed[index].rollout.uid)
        for index, request, log_probs_TR in zip(indices, requests, log_probs, strict=True)
    }


def _probabilities(log_probs_TR: Sequence[Sequence[float]], request: SupportRequest, uid: str) -> list[float]:
    """p at each boundary from one rollout's mean log-probs [boundary][reference], checked."""
    if len(log_probs_TR) != len(request.boundaries):
        raise ScorerError(
            f"support of a rollout of question {uid!r}: {len(request.boundaries)} boundaries sent, "
            f"{len(log_probs_TR)} returned"
        )
    support = []
    for boundary, log_probs_R in zip(request.boundaries, log_probs_TR, strict=True):
        if len(log_probs_R) != len(request.references):
            raise ScorerError(
                f"support of a rollout of question {uid!r} at boundary {boundary}: {len(request.references)} "
                f"references sent, {len(log_probs_R)} returned"
            )
        what = f"mean log-prob of a reference of question {uid!r} at boundary {boundary}"
        checked = [_checked_number(value, what, -math.inf, LOG_PROB_TOLERANCE) for value in log_probs_R]
        support.append(_mean([math.exp(value) for value in checked]))
    return support


def _gains(support: Sequence[float], config: SiopConfig) -> list[float]:
    """gain_t = p_t − p_{t−1} (prob) or log(p_t + eps) − log(p_{t−1} + eps) (log), t = 1 … T."""
    values = list(support)
    if config.siop_gain == "log":
        values = [math.log(value + config.siop_epsilon) for value in values]
    return [after - before for before, after in itertools.pairwise(values)]


def _last_turn_only(turns: int, reward: float) -> list[float]:
    return [0.0] * (turns - 1) + [reward]


# --- the credit methods -----------------------------------------------------------------------------------------------


async def _process(
    parsed: Sequence[_Parsed], tokenizer: PreTrainedTokenizerBase, config: SiopConfig, scorer: SiopScorer
) -> GroupRewards:
    """SIOP: r_t = q(c)·gain_t, the last turn + (1 − lambda)·q(c); with one turn that alone (arXiv 2605.04984)."""
    questions = await _cluster_pass(parsed, config, scorer)
    await _set_targets(parsed, questions, tokenizer, config, scorer)
    clusters = {index: cluster for clusters in questions for cluster in clusters for index in cluster.members}
    references_of = {index: cluster.references for index, cluster in clusters.items()}
    support = await _supports(parsed, references_of, tokenizer, config, scorer)
    rewards = {}
    for index, cluster in clusters.items():
        gains = _gains(support[index], config) if index in support else [0.0]
        rewards[index] = [cluster.target * gain for gain in gains]
        rewards[index][-1] += (1 - config.siop_lambda) * cluster.target
    return _collect(parsed, questions, rewards, support)


async def _majority_binary(
    parsed: Sequence[_Parsed], tokenizer: PreTrainedTokenizerBase, config: SiopConfig, scorer: SiopScorer
) -> GroupRewards:
    """TTRL: 1 on the last turn of every member of the question's largest cluster, else 0 (arXiv 2504.16084).

    Among clusters of equal size the one that was opened first wins. The target is this 0 or 1.
    """
    questions = await _cluster_pass(parsed, config, scorer)
    for clusters in questions:
        if clusters:
            max(clusters, key=lambda cluster: len(cluster.members)).target = 1.0
    return _collect(parsed, questions, _terminal(parsed, questions), {})


async def _cluster_frequency(
    parsed: Sequence[_Parsed], tokenizer: PreTrainedTokenizerBase, config: SiopConfig, scorer: SiopScorer
) -> GroupRewards:
    """EMPO: the mass m(c) of the rollout's cluster on its last turn (arXiv 2504.05812). The target is m(c)."""
    questions = await _cluster_pass(parsed, config, scorer)
    for clusters in questions:
        for cluster in clusters:
            cluster.target = cluster.mass
    return _collect(parsed, questions, _terminal(parsed, questions), {})


async def _gold_reference(
    parsed: Sequence[_Parsed], tokenizer: PreTrainedTokenizerBase, config: SiopConfig, scorer: SiopScorer
) -> GroupRewards:
    """IGPO: the gold answer (first alias) is the only reference, q = 1 (arXiv 2510.14967).

    Turns before the last: r_t = gain_t, also for rollouts without an answer, since the information gain of a search
    does not depend on what is answered in the end. The last turn: token F1 of the answer with the gold aliases, 0
    without an answer, instead of a gain and of (1 − lambda)·q. No clusters are needed, so none are asked for.

    Raises:
        RolloutError: a rollout has no gold answer.
    """
    for item in parsed:
        if not item.rollout.gold or not item.rollout.gold[0].strip():
            raise RolloutError(
                f"siop_use_gold_ref=True needs a gold answer, but a rollout of question {item.rollout.uid!r} has none"
            )
    gold_of = {index: list(item.rollout.gold or ()) for index, item in enumerate(parsed) if item.turns}
    references_of = {index: [gold[0].strip()] for index, gold in gold_of.items()}
    support = await _supports(parsed, references_of, tokenizer, config, scorer)
    rewards = {
        index: [
            *_gains(support.get(index, []), config)[:-1],
            f1_score(parsed[index].answer, gold),
        ]
        for index, gold in gold_of.items()
    }
    result = _collect(parsed, [], rewards, support)
    result.target_mass = [1.0 if index in gold_of else 0.0 for index in range(len(parsed))]
    result.references = [references_of.get(index, []) for index in range(len(parsed))]
    return result


_METHODS: dict[str, Callable[..., Any]] = {
    "process": _process,
    "majority_binary": _majority_binary,
    "cluster_frequency": _cluster_frequency,
}


def _terminal(parsed: Sequence[_Parsed], questions: Sequence[Sequence[_Cluster]]) -> dict[int, list[float]]:
    """The target of each answered rollout on its last turn, 0 before."""
    return {
        index: _last_turn_only(len(parsed[index].turns), cluster.target)
        for clusters in questions
        for cluster in clusters
        for index in cluster.members
    }


def _collect(
    parsed: Sequence[_Parsed],
    questions: Sequence[Sequence[_Cluster]],
    rewards: Mapping[int, list[float]],
    support: Mapping[int, list[float]],
) -> GroupRewards:
    """Results by rollout, in the order given; what a rollout does not have is empty, 0 or None."""
    of = {index: cluster for clusters in questions for cluster in clusters for index in cluster.members}
    indices = range(len(parsed))
    return GroupRewards(
        turn_rewards=[rewards.get(index, []) for index in indices],
        target_mass=[of[index].target if index in of else 0.0 for index in indices],
        references=[list(of[index].references) if index in of else [] for index in indices],
        cluster_ids=[of[index].cluster_id if index in of else None for index in indices],
        support=[support.get(index, []) for index in indices],
        answers=[item.answer for item in parsed],
        evidence=[of[index].evidence if index in of else None for index in indices],
    )


async def compute_group_rewards(
    rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, config: SiopConfig, scorer: SiopScorer
) -> GroupRewards:
    """Turn rewards of a batch of rollouts.

    Args:
        rollouts: rollouts of any number of questions in any order; grouped by uid, list order within a uid.
        tokenizer: the policy's fast tokenizer; the scorer model must share it.
        config: the method and its parameters.
        scorer: answers for all of the batch at once: one call each of ``entailment`` and ``support`` (if needed at
            all), and one ``cluster`` call per question with more than one answer, concurrently.

    Returns:
        One entry per rollout, in the order given. Floats in double precision.

    Raises:
        RolloutError: a malformed rollout, or a missing gold answer where one is needed.
        ScorerError: the scorer returned something that is not valid; nothing is ever filled in.
        ScorerUnavailable: as raised by the scorer.
    """
    parsed = [_parse(rollout, tokenizer) for rollout in rollouts]
    method = _gold_reference if config.siop_use_gold_ref else _METHODS[config.siop_reward_mode]
    rewards: GroupRewards = await method(parsed, tokenizer, config, scorer)
    return rewards
