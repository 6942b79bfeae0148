"""The credit of dumped rollouts under other ``siop_*`` keys, as far as it takes no new scores.

The methods and baselines are the training's own: a :class:`DumpedBatch` answers what they ask out of the dump.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from verl.utils.siop.credit.baselines import STD_FLOOR, Turns, signal
from verl.utils.siop.credit.batch import Cluster, CreditBatch, ParsedRollout
from verl.utils.siop.credit.config import SiopConfig
from verl.utils.siop.credit.registry import BASELINES, CREDIT_METHODS
from verl.utils.siop.credit.rollouts import Rollout
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.inspector.schema import DumpedRollout, DumpedSettings, DumpError
from verl.utils.siop.inspector.summary import by_question
from verl.utils.siop.turn_utils import observation_text

# Keys that decide what the scorer is asked, and by whom; what it answered is in the dump.
SCORED = (
    "siop_boundary", "siop_probe_opening", "siop_reference_prefix", "siop_reference_suffix", "siop_num_refs",
    "siop_evidence", "siop_strict_entailment", "siop_use_gold_ref",
)  # fmt: skip
# Keys without a part in the credit.
_ELSEWHERE = (
    "siop_scorer", "siop_scorer_url", "siop_scorer_timeout_s", "siop_streaming", "siop_on_scorer_error",
    "siop_on_nothing_learnt",
)  # fmt: skip
_OPTIONS = ("gamma", "norm_adv_by_std_in_grpo")
# Control tokens of most templates; a dump has no tokenizer that knows its own.
_CONTROL = re.compile(r"<\|[^|<>]*\|>")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Other keys for the credit.

    Args:
        name: as the user wrote it.
        keys: of verl's ``algorithm`` section.
        kept: keys of a preset that would take new scores, and so stay as they were in the training.
    """

    name: str
    keys: Mapping[str, Any]
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_recipe(texts: Sequence[str], ablations: Path) -> Recipe:
    """A recipe from ``KEY=VALUE`` and ``ablation=NAME``, later ones winning.

    Args:
        texts: of the command line.
        ablations: the folder of the presets.

    Raises:
        SiopConfigError: an unknown preset or key, or a key that takes new scores.
    """
    keys: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    known = {spec.name for spec in dataclasses.fields(SiopConfig)}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.removeprefix("algorithm.")
        if name == "ablation" and equals:
            preset = _preset(value, ablations)
            kept.update({key: item for key, item in preset.items() if key in SCORED})
            keys.update({key: item for key, item in preset.items() if key not in SCORED})
        elif not equals or name not in known | set(_OPTIONS):
            raise SiopConfigError(
                f"--recompute {text} is not allowed; choose ablation=NAME or KEY=VALUE, of the keys "
                f"{', '.join([*_OPTIONS, *sorted(known - set(SCORED) - set(_ELSEWHERE))])}"
            )
        elif name in SCORED or name in _ELSEWHERE:
            why = "takes new scores" if name in SCORED else "has no part in the credit"
            raise SiopConfigError(f"--recompute {text} is not allowed: {name} {why}")
        else:
            keys[name] = yaml.safe_load(value)
    keys = {key: value for key, value in keys.items() if key not in _ELSEWHERE}
    if kept.get("siop_use_gold_ref"):
        raise SiopConfigError(
            f"--recompute {' '.join(texts)} is not allowed: siop_use_gold_ref=True takes the support of the gold answer"
        )
    return Recipe(" ".join(texts), keys, kept)


def _preset(name: str, ablations: Path) -> dict[str, Any]:
    path = ablations / f"{name}.yaml"
    if not ablations.is_dir():
        raise SiopConfigError(
            f"--recompute ablation={name} is not allowed: there is no folder {ablations}, where presets lie; give "
            "their keys as KEY=VALUE"
        )
    if "/" in name or not path.is_file():
        there = sorted(path.stem for path in ablations.glob("*.yaml"))
        raise SiopConfigError(f"--recompute ablation={name} is not allowed; choose one of {', '.join(there) or 'none'}")
    preset = dict(yaml.safe_load(path.read_text(encoding="utf-8"))["algorithm"])
    estimator = preset.pop("adv_estimator", "siop")
    if estimator != "siop":
        raise SiopConfigError(
            f"--recompute ablation={name} is not allowed: adv_estimator={estimator} takes no turn rewards"
        )
    return preset


def check_recipe(settings_of: Sequence[Sequence[DumpedSettings]], recipe: Recipe) -> None:
    """Refuse a recipe under which no run can be recomputed, before anybody waits for it.

    Args:
        settings_of: of each run those that are there; none is known of a run that has not dumped a step.
        recipe: what is other.

    Raises:
        DumpError, SiopConfigError: why the first run cannot be.
    """
    refusals: list[SiopError] = []
    for settings in settings_of:
        try:
            for one in settings:
                _configured(one, recipe)
            return
        except SiopError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _configured(settings: DumpedSettings, recipe: Recipe | None) -> tuple[SiopConfig, dict[str, Any]]:
    """The method's keys and the whole algorithm section, see :func:`recompute`."""
    algorithm = {**settings.algorithm, **(recipe.keys if recipe else {})}
    if settings.algorithm.get("adv_estimator") != "siop":
        raise DumpError(f"the training used adv_estimator={settings.algorithm.get('adv_estimator')}: it has no scores")
    if algorithm.get("use_kl_in_reward"):
        raise DumpError("the training had a KL penalty in its rewards (use_kl_in_reward): not recomputed")
    gamma, scale = algorithm.get("gamma", 1.0), algorithm.get("norm_adv_by_std_in_grpo", True)
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 <= gamma <= 1:
        raise SiopConfigError(f"gamma={gamma!r} is not allowed; choose a number from 0 to 1")
    if not isinstance(scale, bool):
        raise SiopConfigError(f"norm_adv_by_std_in_grpo={scale!r} is not allowed; choose true or false")
    return SiopConfig.from_algorithm(algorithm), algorithm


class DumpedBatch(CreditBatch):
    """Rollouts of a dump as a credit method takes them: what was asked of the scorer is answered from the dump.

    Args:
        rollouts: of one step.
        config: the keys of the credit.
    """

    def __init__(self, rollouts: Sequence[DumpedRollout], config: SiopConfig) -> None:
        self.config, self._dumped, self._observed = config, list(rollouts), {}
        self.parsed = [_parsed(rollout) for rollout in rollouts]
        numbered = list(enumerate(rollouts))
        self.questions = [[index for index, _ in group] for group in by_question(numbered, lambda item: item[1].group)]

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """Only for rollouts whose calls nobody recorded."""
        raise DumpError("the dump records no executed calls, so that queries cannot be counted")

    async def _cluster_question(self, members: Sequence[int]) -> list[Cluster]:
        valid = [index for index in members if self.parsed[index].answer]
        by_id: dict[int, list[int]] = {}
        for index in valid:
            cluster = self._dumped[index].cluster
            if cluster is None:
                raise DumpError(f"rollout {self._dumped[index].uid} has no cluster: its method asked for none")
            by_id.setdefault(cluster, []).append(index)
        return [
            Cluster(
                cluster_id=cluster_id,
                members=indices,
                references=list(self._dumped[indices[0]].references or ()),
                mass=len(indices) / len(valid),
            )
            for cluster_id, indices in by_id.items()
        ]

    def _set_votes(self, clusters: Sequence[Cluster]) -> None:
        votes = [self._dumped[cluster.members[0]].votes for cluster in clusters]
        if None in votes:  # of a training that counted
            super()._set_votes(clusters)
        else:
            for cluster, share in zip(clusters, votes, strict=True):
                cluster.votes = share

    def _observation(self, index: int, turn: int) -> list[str]:
        rollout = self._dumped[index]
        before, after = rollout.turns[turn : turn + 2]
        text = observation_text(_CONTROL.sub(" ", rollout.output[before.chars[1] : after.chars[0]]))
        return [text] if text else []

    async def _set_evidence(self, clusters: Sequence[Cluster]) -> None:
        for cluster in clusters:
            first = self._dumped[cluster.members[0]]
            if first.evidence is None:
                raise DumpError(
                    f"rollout {first.uid} has no evidence: siop_eta was 0, or its method needs none; with siop_eta=0 "
                    "it can be recomputed"
                )
            cluster.evidence = first.evidence

    async def supports(
        self, references_of: Mapping[int, Sequence[str]], least_turns: int = 2
    ) -> dict[int, list[float]]:
        """See :meth:`CreditBatch.supports`."""
        found = {}
        for index in sorted(references_of):
            if len(self.parsed[index].turns) >= least_turns:
                if not self._dumped[index].support:
                    raise DumpError(f"rollout {self._dumped[index].uid} has no support: its method measured none")
                found[index] = list(self._dumped[index].support or ())
        return found


def _parsed(rollout: DumpedRollout) -> ParsedRollout:
    turns = [span.tokens for span in rollout.turns if span.tokens is not None]
    if rollout.dump_version < 2:
        raise DumpError(
            f"rollout {rollout.uid} is of dump version 1, which holds neither token ranges nor settings: nothing can "
            "be recomputed"
        )
    token_free = Rollout(
        uid=rollout.group,
        question=rollout.question or "",
        prompt_ids=[],
        response_ids=[],
        response_mask=[],
        executed_calls=_executed(rollout),
        turn_scores=rollout.turn_scores or None,
        outcome=rollout.success,
    )
    return ParsedRollout(token_free, turns, rollout.answer or "")


def _executed(rollout: DumpedRollout) -> list[list[tuple[str, str]]] | None:
    calls = (rollout.siop_tools or {}).get("executed_calls")
    try:
        return None if calls is None else [[(str(name), str(text)) for name, text in turn] for turn in calls]
    except (TypeError, ValueError) as error:
        raise DumpError(f"rollout {rollout.uid}: siop_tools.executed_calls are no names and arguments") from error


def recompute(
    rollouts: Sequence[DumpedRollout], settings: DumpedSettings, recipe: Recipe | None = None
) -> dict[str, dict[str, list[float]]]:
    """Turn rewards and advantages of a whole step under other keys; under its own where ``recipe`` is None.

    Args:
        rollouts: all of one step: some baselines scale by the whole batch.
        settings: of the training.
        recipe: what is other.

    Returns:
        By uid ``rewards``, ``returns`` and ``advantages``, each T values in the precision of the update; zeros for a
        rollout without rewards, and for a question that was left out.

    Raises:
        DumpError: the dump does not hold what the keys need.
        SiopConfigError: the keys do not go together.
    """
    config, algorithm = _configured(settings, recipe)
    kept = [rollout for rollout in rollouts if not rollout.dropped]
    if config.siop_use_gold_ref:
        rewards = _dumped_rewards(kept, recipe, config)
    else:
        rewards = asyncio.run(_paid(DumpedBatch(kept, config)))
    rows = [
        np.array(row, dtype=np.float32).astype(np.float64) if row else np.zeros(len(rollout.turns))
        for row, rollout in zip(rewards, kept, strict=True)
    ]
    values = {rollout.uid: (np.zeros(len(rollout.turns)),) * 3 for rollout in rollouts}
    values.update(_estimate(kept, rows, config, algorithm))
    names = ("rewards", "returns", "advantages")
    return {
        uid: {name: row.astype(np.float32).astype(float).tolist() for name, row in zip(names, three, strict=True)}
        for uid, three in values.items()
    }


async def _paid(batch: DumpedBatch) -> list[list[float]]:
    return (await CREDIT_METHODS[batch.config.siop_reward_mode](batch)).turn_rewards


def _dumped_rewards(kept: Sequence[DumpedRollout], recipe: Recipe | None, config: SiopConfig) -> list[list[float]]:
    """Of a training on gold references: its rewards as they are, for other baselines."""
    changed = sorted(set(recipe.keys if recipe else ()) & {"siop_reward_mode", "siop_gain", "siop_epsilon"})
    if changed:
        raise DumpError(f"{changed[0]}={getattr(config, changed[0])} is not recomputed with siop_use_gold_ref=True")
    return [list(rollout.turn_rewards or ()) for rollout in kept]


def _estimate(
    kept: Sequence[DumpedRollout], rows: Sequence[np.ndarray], config: SiopConfig, algorithm: Mapping[str, Any]
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By uid rewards, returns and advantages; the estimator of the trainer, on turns instead of tokens."""
    with_turns = [index for index, row in enumerate(rows) if len(row)]
    if not with_turns:
        return {}
    scale = bool(algorithm.get("norm_adv_by_std_in_grpo", True))
    turns_B = np.array([len(rows[index]) for index in with_turns])
    reached_BT = np.arange(turns_B.max())[None, :] < turns_B[:, None]
    rewards_BT = np.zeros(reached_BT.shape)
    rewards_BT[reached_BT] = np.concatenate([rows[index] for index in with_turns])
    number_of: dict[str, int] = {}
    group_B = np.array([number_of.setdefault(kept[index].group, len(number_of)) for index in with_turns])
    turns = Turns(rewards_BT, reached_BT, group_B, float(algorithm.get("gamma", 1.0)), scale, config)
    if config.outcome_advantage:
        totals_B = np.cumsum(rewards_BT, axis=1)[:, -1]
        advantages_BT = returns_BT = np.where(
            reached_BT, _outcome_advantages(totals_B, group_B, scale, config.reward_noise)[:, None], 0.0
        )
    else:
        advantages_BT, returns_BT = BASELINES[config.siop_baseline](turns), turns.returns()
    return {
        kept[index].uid: (rows[index], returns_BT[row, : turns_B[row]], advantages_BT[row, : turns_B[row]])
        for row, index in enumerate(with_turns)
    }


def _outcome_advantages(totals_B: np.ndarray, group_B: np.ndarray, scale: bool, noise: float) -> np.ndarray:
    """GRPO: (R − mean) / (std + 1e-6) within the question, times :func:`signal`; a question's only rollout keeps R."""
    found_B = np.zeros(len(totals_B))
    for group in np.unique(group_B):
        rows = np.flatnonzero(group_B == group)
        values = totals_B[rows]
        if len(rows) == 1:
            found_B[rows] = values / (1.0 + STD_FLOOR) if scale else values
        elif scale:
            std = values.std(ddof=1)
            found_B[rows] = (values - values.mean()) / (std + STD_FLOOR) * signal(std, noise)
        else:
            found_B[rows] = values - values.mean()
    return found_B
