"""verl's synchronous PPO trainer with SIOP turn rewards in the place of the outcome reward."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.siop.evaluation.recorder import Recorder
from verl.trainer.siop.policy_scorer import PolicyScorer
from verl.trainer.siop.replay_buffer import CheckedReplayBuffer, column
from verl.trainer.siop.report import METRICS_FILE, core_metrics
from verl.trainer.siop.rollouts import dump
from verl.trainer.siop.rollouts.alarms import NothingLearntAlarm, Step
from verl.trainer.siop.rollouts.metrics import tool_metrics
from verl.trainer.siop.rollouts.rows import (
    ACTIONS,
    GAME,
    GROUP,
    SUCCESS,
    TURN_SCORES,
    group_of,
    outcomes_of,
    question_of,
    sample_of,
    session_of,
    turn_scores_of,
)
from verl.trainer.siop.rollouts.tool_calls import FIELD
from verl.trainer.siop.run.counting import QuestionCounter
from verl.trainer.siop.run.liveness import Liveness
from verl.trainer.siop.run.supervised import SupervisedTrainer
from verl.trainer.siop.scoring import RewardStream, Scores, TimedScorer, measure_noise, open_client, score_batch
from verl.utils.debug import marked_timer
from verl.utils.reward_score.siop_reward import parse_aliases, place_turn_rewards
from verl.utils.siop.credit.metrics import group_metrics
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.files import write_whole
from verl.utils.siop.siop_process_reward import Rollout, SiopConfig, SiopScorer
from verl.utils.siop.turn_utils import extract_answer, get_assistant_turn_ranges
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # verl leaves the root at WARNING

_ROLLOUT_FIELDS = (
    "prompts",
    "responses",
    "response_mask",
    "raw_prompt",
    "reward_model",
    "extra_info",
    "extra_fields",
)


@register_trainer("siop")
class SiopTrainer(SupervisedTrainer):
    """``trainer.v1.trainer_mode=siop``.

    With ``algorithm.adv_estimator=siop`` the token rewards of a step (``rm_scores``) are replaced by SIOP's turn
    rewards before the advantage is computed; with any other estimator it is verl's synchronous trainer.
    """

    # Upstream compares this name with "sync" to choose the synchronous replay buffer, batch size and checkpoint.
    trainer_mode = property(lambda self: "sync", lambda self, value: None)

    replay_buffer: CheckedReplayBuffer
    # Of a training; nobody looks at an evaluation.
    _alarm: NothingLearntAlarm | None = None
    _told_of_labels = False
    # Of the step whose rollouts are being generated.
    _stream: RewardStream | None = None
    # Of the policy as its own scorer, once it is measured.
    _noise: float | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not isinstance(self.replay_buffer, CheckedReplayBuffer):
            raise SiopConfigError(
                f"trainer.v1.sampler.custom_sampler={type(self.replay_buffer).__name__} is not allowed; the siop "
                "trainer needs CheckedReplayBuffer or a subclass of it"
            )
        self.uses_siop = config.algorithm.adv_estimator == "siop"
        self.siop, self.gamma = SiopConfig.from_algorithm(config.algorithm), float(config.algorithm.gamma)
        self.scale = bool(config.algorithm.norm_adv_by_std_in_grpo)
        self._records: dict[str, dict[str, Any]] = {}
        # Of the step: the assistant turns of each rollout, before a question is dropped from the update.
        self._turns: dict[str, list[tuple[int, int]]] = {}
        if self.uses_siop and self._streams():
            self.replay_buffer.on_finished = self._question_finished

    def on_train_begin(self) -> None:
        super().on_train_begin()
        self._alarm = NothingLearntAlarm(self.siop.siop_on_nothing_learnt, self.config)

    def fit(self, agent_loop_manager: Any) -> None:
        # A manager of the user's own may keep its workers elsewhere.
        if workers := getattr(agent_loop_manager, "agent_loop_workers", None):
            self.replay_buffer.dead_worker = Liveness(workers).died
        super().fit(agent_loop_manager)

    # ------------------------------------------------------------------ rewards
    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        self._records = {}
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
        # Rollout order within a question is the order of its sessions, whatever order verl's balancing left.
        keys.sort(key=session_of)
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=list(_ROLLOUT_FIELDS))
        masks = column(data, "response_mask")
        self._turns = {key: get_assistant_turn_ranges(mask) for key, mask in zip(keys, masks, strict=True)}
        self._outcome_metrics(keys, data, metrics)
        records = [fields[FIELD] for fields in column(data, "extra_fields") if FIELD in fields]
        metrics.update(tool_metrics(records))
        if self.uses_siop:
            with marked_timer("siop_rewards", self.timing_raw, color="brown"):
                self._write_turn_rewards(keys, data, batch.partition_id, metrics)
        result = super()._compute_advantage(batch, metrics)
        if self._alarm is not None:
            learns = None
            if self._alarm.starting:
                advantages = tq.kv_batch_get(keys, batch.partition_id, ["advantages"])
                learns = any(bool(values.any()) for values in column(advantages, "advantages"))
            # Before the update: there may be nothing to update with.
            self._alarm.look(self._seen(keys, data, records, learns))
        return result

    def _seen(self, keys: list[str], data: TensorDict, records: list[dict[str, Any]], learns: bool | None) -> Step:
        prompts, responses, masks = (column(data, name) for name in ("prompts", "responses", "response_mask"))

        actions = [fields.get(ACTIONS) for fields in column(data, "extra_fields")]

        def answer(row: int) -> str:
            if actions[row] is not None:
                return "" if self._records[keys[row]].get("invalid") == 1 else " ".join(actions[row])
            known = self._records[keys[row]].get("answer")
            if known is not None:
                return known
            turns = get_assistant_turn_ranges(masks[row])
            return extract_answer(responses[row].tolist(), turns, self.tokenizer, prompts[row].tolist())

        return Step(
            number=self.global_steps,
            answers=[answer(row) for row in range(len(keys))],
            # Only if every rollout was counted do the records say something about the step.
            records=records if len(records) == len(keys) else [],
            learns=learns,
            wanted="answer" if None in actions else "action",
            text=lambda row: self.tokenizer.decode(responses[row][masks[row] == 1]),
        )

    def _outcome_metrics(self, keys: list[str], data: TensorDict, metrics: dict) -> None:
        """What the reward function or the agent loop says of the outcome (EM and F1, the success of a game), under its
        own names: ``critic/score`` shows the turn rewards."""
        found: dict[str, list[float]] = {}
        last = {session_of(key)[:2]: key for key in keys}
        for key, fields in zip(keys, column(data, "extra_fields"), strict=True):
            outcome = outcomes_of(fields)
            self._records[key] = dict(outcome)
            for name in (FIELD, ACTIONS, GAME, GROUP):
                if fields.get(name) not in (None, [], {}):
                    self._records[key][name] = fields[name]
            if (turn_scores := turn_scores_of(fields)) is not None:
                self._records[key][TURN_SCORES] = turn_scores
            # Of several trajectories of a session, all have the outcome of the session.
            for name, value in outcome.items() if last[session_of(key)[:2]] == key else ():
                found.setdefault(name, []).append(value)
        metrics.update({f"siop/outcome/{name}": float(np.mean(values)) for name, values in found.items()})

    def _write_turn_rewards(self, keys: list[str], data: TensorDict, partition_id: str, metrics: dict) -> None:
        rollouts = self._rollouts(keys, data)
        scores = self._scores(rollouts)
        rewards, kept, dropped = scores.rewards, scores.rows, scores.dropped

        masks = column(data, "response_mask")
        turn_rewards: list[list[float]] = [[] for _ in masks]
        for row, values in zip(kept, rewards.turn_rewards, strict=True):
            turn_rewards[row] = values
        placed = list(place_turn_rewards(turn_rewards, masks))
        tq.kv_batch_put(
            keys=keys,
            partition_id=partition_id,
            fields=TensorDict({"rm_scores": _jagged(placed)}, batch_size=len(keys)),
        )
        if any(rollout.uid != session_of(key)[0] for key, rollout in zip(keys, rollouts, strict=True)):
            # The estimator compares what has the same uid.
            uids = list_of_dict_to_tensordict([{"uid": rollout.uid} for rollout in rollouts])
            tq.kv_batch_put(keys=keys, partition_id=partition_id, fields=uids)
        if dropped:
            rows = [row for row, rollout in enumerate(rollouts) if rollout.uid in dropped]
            nothing = _jagged([torch.zeros_like(masks[row]) for row in rows])
            # verl divides the loss by the tokens of loss_mask, a copy of response_mask of its own.
            tq.kv_batch_put(
                keys=[keys[row] for row in rows],
                partition_id=partition_id,
                fields=TensorDict({"response_mask": nothing, "loss_mask": nothing}, batch_size=len(rows)),
            )

        labels = column(data, "reward_model")
        metrics.update(
            group_metrics(
                rewards,
                [rollouts[row] for row in kept],
                self.siop,
                self.gamma,
                [self._gold(labels[r]) for r in kept],
                self.scale,
            )
        )
        metrics["siop/dropped_groups"] = float(len(dropped))
        metrics.update(scores.cost)
        for row, rollout in enumerate(rollouts):
            self._records[keys[row]]["dropped"] = rollout.uid in dropped
        for index, row in enumerate(kept):
            self._records[keys[row]].update(
                question=rollouts[row].question,
                answer=rewards.answers[index],
                cluster=rewards.cluster_ids[index],
                mass=rewards.masses[index] if rewards.masses else None,
                votes=rewards.votes[index] if rewards.votes else None,
                evidence=rewards.evidence[index] if rewards.evidence else None,
                target=rewards.target_mass[index],
                references=rewards.references[index],
                support=rewards.support[index],
                # As float32, the precision in which the update receives them.
                turn_rewards=[float(np.float32(value)) for value in rewards.turn_rewards[index]],
            )

    # ------------------------------------------------------------------ scoring
    def _streams(self) -> bool:
        """Whether questions are scored while others generate: the policy itself cannot do both."""
        return self.siop.needs_scorer and self.siop.siop_streaming and self.siop.siop_scorer == "server"

    def _question_finished(self, keys: list[str], partition_id: str) -> None:
        """A question's last rollout has ended."""
        if self._stream is None:
            self._stream = RewardStream(self.siop, self.tokenizer)
        keys = sorted(keys, key=session_of)
        data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=list(_ROLLOUT_FIELDS))
        self._stream.add(self._rollouts(keys, data))

    def _scores(self, rollouts: list[Rollout]) -> Scores:
        if not self._streams():
            return asyncio.run(self._score_batch(rollouts))
        stream, self._stream = self._stream or RewardStream(self.siop, self.tokenizer), None
        return stream.collect(rollouts)

    def _rollouts(self, keys: list[str], data: TensorDict) -> list[Rollout]:
        fields = column(data, "extra_fields")
        several = [key for i, key in enumerate(keys) if session_of(key)[2] > 0 and GROUP not in fields[i]]
        if several:
            raise SiopError(
                f"the agent loop returned several trajectories for one session (for example {several[0]}) and no "
                f"extra_fields[{GROUP!r}] that says which of them are compared; SIOP needs one trajectory per session"
            )
        prompts, responses, masks, messages, extras, labels = (
            column(data, name)
            for name in ("prompts", "responses", "response_mask", "raw_prompt", "extra_info", "reward_model")
        )
        return [
            Rollout(
                uid=group_of(keys[i], fields[i])[0],
                question=question_of(messages[i], extras[i]),
                prompt_ids=prompts[i].tolist(),
                response_ids=responses[i].tolist(),
                response_mask=masks[i].tolist(),
                gold=parse_aliases(labels[i]) if self.siop.siop_use_gold_ref else None,
                executed_calls=fields[i].get(FIELD, {}).get("executed_calls"),
                turn_scores=turn_scores_of(fields[i]),
                outcome=outcomes_of(fields[i]).get(SUCCESS),
            )
            for i in range(len(keys))
        ]

    def _gold(self, label: Any) -> list[str]:
        """The gold answers for the metrics; none where a reward function of the user's reads labels of its own form."""
        try:
            return parse_aliases(label)
        except ValueError as error:
            if not self._told_of_labels:
                self._told_of_labels = True
                logger.warning("no siop/heaviest_cluster_right: %s", error)
            return []

    async def _score_batch(self, rollouts: list[Rollout]) -> Scores:
        """All rollouts at once, at the end of the step."""
        async with open_client(self.siop) as client:
            if self.siop.siop_scorer == "policy":
                await self._measure_noise(client, rollouts)
            scorer = TimedScorer(client if self.siop.siop_scorer == "server" else self._policy_scorer(client))
            start = time.perf_counter()
            scores = await score_batch(rollouts, self.tokenizer, self.siop, scorer)
            seconds = time.perf_counter() - start
            scores.cost.update({"siop/seconds/busy": seconds, "siop/seconds/exposed": seconds})
            return scores

    async def _measure_noise(self, nli: SiopScorer, rollouts: list[Rollout]) -> None:
        """Of the policy, in the first step that it scores; that of a service the checks before the start measure."""
        if self._noise is not None or not self.siop.measures_support:
            return
        sample = sample_of(rollouts[0].question)
        self._noise = await measure_noise(self._policy_scorer(nli), self.tokenizer, self.siop, sample)
        logger.info("the policy as scorer: noise %.1e", self._noise)
        if self._noise > self.siop.siop_scorer_noise:
            # The estimator reads it there.
            OmegaConf.update(self.config, "algorithm.siop_scorer_noise", self._noise)
            self.siop = dataclasses.replace(self.siop, siop_scorer_noise=self._noise)

    def _policy_scorer(self, nli: SiopScorer) -> PolicyScorer:
        return PolicyScorer(nli, self.actor_rollout_wg, self.config.actor_rollout_ref.rollout)

    # ------------------------------------------------------------------ reports
    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, *args: Any, **kwargs: Any) -> Any:
        result = super()._compute_metrics(batch, metrics, *args, **kwargs)
        if folder := self.config.trainer.get("rollout_data_dir"):
            dump.append_step(Path(folder), self.global_steps, metrics)
        return result

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        """One JSON line per rollout: texts, and what each stage of the method and the estimator made of it."""
        with marked_timer("dump_rollout_generations", timing_raw, color="green"):
            keys = sorted(self._records, key=session_of)
            fields = [*dump.FIELDS, *([dump.KL_FIELD] if self.config.algorithm.use_kl_in_reward else [])]
            data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
            settings = dump.settings_of(self.config, self.siop)
            dump.write_settings(Path(rollout_data_dir), settings)
            columns = dump.columns(
                keys,
                data,
                [self._turns[key] for key in keys],
                [self._records[key] for key in keys],
                self.tokenizer,
                settings,
                self.siop if self.uses_siop else None,
            )
            inputs, outputs, gts, scores = (columns.pop(name) for name in ("input", "output", "gts", "score"))
            self._dump_generations(inputs, outputs, gts, scores, columns, rollout_data_dir)

    def _validate(self) -> dict[str, float]:
        named = self.config.trainer.get("validation_data_dir")
        folder, recorder = Path(named) if named else None, None
        # The weights of a validation in training are in no file.
        if folder is not None and self.config.trainer.get("val_only", False):
            recorder = Recorder(folder, self.config, self.tokenizer)
            self.replay_buffer.on_validation = recorder.note
        self.replay_buffer.on_progress = QuestionCounter(len(self.val_dataset), self._channel)
        try:
            metrics = super()._validate()
        finally:
            self.replay_buffer.on_progress = None
        metrics.update(core_metrics(metrics))
        metrics.update(self.replay_buffer.take_validation_metrics())
        if recorder is not None:
            recorder.finish()
        if folder is not None:
            values = {name: float(value) for name, value in metrics.items()}
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / METRICS_FILE, json.dumps(values, indent=1, sort_keys=True).encode())
        return metrics


def _jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
