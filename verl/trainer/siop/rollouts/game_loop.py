"""verl's agent loop for games: a turn is one action, the oracle's verdict on it is the turn's score.

``config/game_loop.yaml`` registers it (``actor_rollout_ref.rollout.agent.agent_loop_config_path``), and the column
``agent_name`` of the data chooses it; ``import verl`` does not load it.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
from verl.trainer.siop.rollouts.rows import ACTIONS, GAME, TURN_SCORES
from verl.utils.profiler import simple_timer
from verl.utils.siop.chat_markup import without_special_tokens
from verl.utils.siop.credit.config import finite_number
from verl.utils.siop.envs.games import EXACT, Env, Game, Judge, Step, find
from verl.utils.siop.errors import GameError, RolloutError
from verl.utils.siop.turn_utils import opens_thinking, without_thinking


@dataclass
class _Play:
    """A rollout so far: its tokens, and a score for each of the policy's turns."""

    messages: list[dict[str, Any]]
    ids: list[int]  # of prompt and response
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    texts: list[str] = field(default_factory=list)  # without thinking
    said: str = ""  # the last turn with it
    scores: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    truncated: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)  # of the engine


class VerifiedGameLoop(AgentLoopBase):
    """``agent_name=verified_game``: a game is one rollout. The row's ``extra_info`` holds ``game`` and ``spec`` (JSON).

    ``extra_fields`` gets ``turn_scores``, one for each assistant turn in the mask whatever became of it: a turn without
    a valid action, and one that the length limit cut, has the invalid score. ``reward_score`` is the outcome, 1 with a
    success, else 0. Thinking, closed or not, is no part of a turn: an action in it is none. ``reward_extra_info``, with
    the same keys in every row:

    - ``success``, ``completion``: of the game
    - ``oracle_rate``: share of the turns whose action the exact oracle calls right, whoever gives the scores
    - ``oracle_error``: mean of \\|score − exact verdict\\| over the turns with a valid action: how far the scores err
    - ``invalid``: share of the turns without a valid action; ``truncated``: 1 if the length limit cut the rollout
    - ``ceiling_success``, ``ceiling_completion``: of oracle play on the same board

    Args:
        oracle, simulations, flip, invalid_score: see :class:`~verl.utils.siop.envs.games.Judge`.
        module: Python module that registers further games, imported first.
        **kwargs: of verl.

    Raises:
        GameError: no such game, or its spec cannot be played.
        RolloutError: the engine gave no tokens, or ``max_assistant_turns`` is below the turns of the game.
    """

    # The loop gives each rollout its own outcome; labels and answers are not needed.
    SCORES_ITSELF = True

    tokenizer: Any

    def __init__(
        self,
        *args: Any,
        oracle: str = EXACT,
        simulations: int | None = None,
        flip: float = 0.0,
        invalid_score: float = 0.0,
        module: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        given = {"oracle": oracle, "simulations": simulations, "flip": flip, "invalid_score": invalid_score}
        self.judge = VerifiedGameLoop.judge_of({**given, "module": module})
        self.response_length = self.rollout_config.response_length
        context = self.rollout_config.max_model_len
        self.context = context or self.rollout_config.prompt_length + self.response_length

    @staticmethod
    def wrong_row(extra: Mapping[str, Any] | None) -> str:
        """What is wrong with a row's ``extra_info``, or nothing: it must hold a game that can be played."""
        if not isinstance(extra, Mapping):
            return f"extra_info is {extra!r:.100}, needs a struct with a game and its spec (see envs.build)"
        for name in ("ceiling_success", "ceiling_completion"):
            number = finite_number(extra.get(name))
            if number is None or not 0 <= number <= 1:
                return f"extra_info.{name} is {extra.get(name)!r:.100}, needs a number from 0 to 1 (see envs.build)"
        try:
            game, spec = _game(extra)
            Env(game).reset(spec)
        except GameError as error:
            return str(error)
        return ""

    @staticmethod
    def wrong_judge(extra: Mapping[str, Any], judge: Judge) -> str:
        """What keeps a row's game, which can be played, from being judged, or nothing. Asks its oracle once."""
        try:
            game, spec = _game(extra)
            env = Env(game, judge)
            env.reset(spec)
            env.right_actions()
        except GameError as error:
            return str(error)
        return ""

    @classmethod
    def judge_of(cls, options: Mapping[str, Any]) -> Judge:
        """Who judges, by the options of this agent loop's entry in the YAML; imports ``module``. A subclass may have
        options of its own: keyword arguments of its constructor.

        Raises:
            GameError: an option that there is not, or a value that is not allowed.
        """
        own = [spec.name for spec in fields(Judge)]
        known = list(dict.fromkeys(name for found in reversed(cls.__mro__) for name in _keywords(found)))
        if unknown := [name for name in options if name not in ("name", "_target_", *known)]:
            raise GameError(f"{unknown[0]}={options[unknown[0]]!r} is no option; choose one of {', '.join(known)}")
        module = options.get("module")
        if module is not None and not isinstance(module, str):
            raise GameError(f"module={module!r} is not allowed; needs the name of a Python module")
        if module:
            importlib.import_module(module)
        return Judge(**{name: options[name] for name in own if name in options})

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        extra = kwargs["extra_info"]
        env = self._env(extra, f"{extra['spec']} {kwargs.get('global_steps')} {kwargs.get('session_id')}")
        messages = [dict(message) for message in kwargs["raw_prompt"]]
        play = _Play(messages, await self.ct_build_initial_tokens(messages))
        request_id = uuid4().hex
        while not env.done and await self._turn(env, play, sampling_params, request_id):
            pass
        return self._output(play, extra)

    def _env(self, extra: Mapping[str, Any], seed: str) -> Env:
        game, spec = _game(extra)
        env = Env(game, self.judge, seed)
        env.reset(spec)
        limit = self.rollout_config.multi_turn.max_assistant_turns
        if limit and limit < env.rules.turns:
            raise RolloutError(
                f"actor_rollout_ref.rollout.multi_turn.max_assistant_turns={limit} is below the {env.rules.turns} "
                f"turns of this {extra['game']}: set it to null, for a game ends by itself"
            )
        return env

    async def _turn(self, env: Env, play: _Play, sampling_params: dict[str, Any], request_id: str) -> bool:
        """One turn with its score, and what comes next; whether the game goes on."""
        step = await self._act(env, play, sampling_params, request_id)
        return step is not None and not step.done and await self._observe(play, play.said, step.observation)

    async def _act(self, env: Env, play: _Play, sampling_params: dict[str, Any], request_id: str) -> Step | None:
        """One turn with its score; None if the length limit cut it."""
        thinking = opens_thinking(play.ids, self.tokenizer)
        room = min(self.response_length - len(play.mask), self.context - len(play.ids))
        with simple_timer("generate_sequences", play.metrics):
            output = await self.server_manager.generate(
                request_id=request_id, prompt_ids=play.ids, sampling_params={**sampling_params, "max_tokens": room}
            )
        if not output.token_ids:
            raise RolloutError(f"the rollout engine returned no tokens for turn {len(play.scores) + 1}")
        self._note_engine(play, output)
        merged, play.mask, play.logprobs = await self.ct_merge_assistant_token(
            play.ids,
            output.token_ids,
            play.mask,
            play.logprobs if play.mask else ([] if output.log_probs else None),
            assistant_logprobs=output.log_probs or None,
        )
        play.ids = merged.token_ids
        play.said = self.tokenizer.decode(output.token_ids, skip_special_tokens=True)
        play.texts.append(self._spoken(output.token_ids, thinking))
        if len(output.token_ids) >= room and output.token_ids[-1] != self.tokenizer.eos_token_id:
            play.truncated = True
            play.scores.append(self.judge.invalid_score)
            return None
        # An oracle may take a while, and others' rollouts go on meanwhile.
        step = await asyncio.to_thread(env.step, play.texts[-1])
        play.steps.append(step)
        play.scores.append(step.score)
        return step

    def _spoken(self, token_ids: list[int], thinking: bool) -> str:
        """A turn's text without its thinking, closed or not, whose tags may be special tokens, and without those."""
        text = without_thinking(self.tokenizer.decode(token_ids, skip_special_tokens=False), thinking, keep_open=False)
        return without_special_tokens(text, self.tokenizer).strip()

    async def _observe(self, play: _Play, text: str, observation: str) -> bool:
        """Show the player what comes next; whether a turn fits after it."""
        before = [*play.messages, {"role": "assistant", "content": text}]
        play.messages = [*before, {"role": "user", "content": observation}]
        merged, mask, logprobs = await self.ct_merge_context_msg(
            before, play.messages, play.ids, play.mask, play.logprobs
        )
        if len(mask) >= self.response_length or len(merged.token_ids) >= self.context:
            play.truncated = True
            return False
        play.ids, play.mask, play.logprobs = merged.token_ids, mask, logprobs
        return True

    def _note_engine(self, play: _Play, output: Any) -> None:
        """The engine's own fields, which verl's metrics read: those of the first turn, the newest weights of all."""
        if not play.fields:
            play.fields.update(output.extra_fields)
        elif newest := output.extra_fields.get("max_global_steps"):
            play.fields["max_global_steps"] = newest
        preempted = output.num_preempted
        if preempted is not None:
            play.metrics["num_preempted"] = max(play.metrics.get("num_preempted", 0), 0) + preempted

    def _output(self, play: _Play, extra: Mapping[str, Any]) -> AgentLoopOutput:
        # What cannot be seen of a response is cut off, a score of a turn never: every turn has its first token in it.
        length = min(len(play.mask), self.response_length)
        start = len(play.ids) - len(play.mask)
        info = outcome_of(play.steps, play.scores, play.truncated, extra)
        return AgentLoopOutput(
            prompt_ids=play.ids[:start],
            response_ids=play.ids[start : start + length],
            response_mask=play.mask[:length],
            response_logprobs=play.logprobs[:length] if play.logprobs else None,
            reward_score=info["success"],
            num_turns=2 * len(play.scores),
            metrics=AgentLoopMetrics(**play.metrics),
            extra_fields={
                **play.fields,
                TURN_SCORES: play.scores,
                "tool_rewards": [],
                ACTIONS: play.texts,
                GAME: {"name": str(extra["game"]), "spec": str(extra["spec"])},
                "reward_extra_info": info,
            },
        )


def _keywords(cls: type) -> list[str]:
    """Keyword arguments of the constructor that a class of ours or of the user's defines."""
    if not issubclass(cls, VerifiedGameLoop) or "__init__" not in vars(cls):
        return []
    parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
    return [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]


def _game(extra: Mapping[str, Any]) -> tuple[Game, dict[str, Any]]:
    """The game of a row and its spec.

    Raises:
        GameError: there is none of this name, or its spec is no JSON object.
    """
    try:
        spec = json.loads(extra.get("spec") or "")
    except (TypeError, ValueError, RecursionError) as error:
        raise GameError(f"extra_info.spec={extra.get('spec')!r:.100} is not JSON: {error!s:.100}") from error
    if not isinstance(spec, dict):
        raise GameError(f"extra_info.spec={spec!r:.100} is not allowed; needs an object")
    return find(str(extra.get("game"))), spec


def outcome_of(steps: list[Step], scores: list[float], truncated: bool, extra: Mapping[str, Any]) -> dict[str, float]:
    """``reward_extra_info`` of a rollout, see :class:`VerifiedGameLoop`.

    Args:
        steps: the turns that were played.
        scores: of all turns, the cut one among them.
        truncated: whether the length limit ended it.
        extra: the row's ``extra_info``.
    """
    turns, valid = len(scores), [step for step in steps if step.valid]
    return {
        "success": float(bool(steps) and steps[-1].success),
        "completion": float(steps[-1].completion) if steps else 0.0,
        "oracle_rate": sum(step.right for step in steps) / turns,
        "oracle_error": sum(abs(step.score - step.right) for step in valid) / max(len(valid), 1),
        "invalid": (turns - len(valid)) / turns,
        "truncated": float(truncated),
        "ceiling_success": float(extra["ceiling_success"]),
        "ceiling_completion": float(extra["ceiling_completion"]),
    }
