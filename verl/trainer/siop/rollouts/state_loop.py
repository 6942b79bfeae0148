"""verl's agent loop for games whose turns do not fit one sequence: every turn is a rollout of its own.

``config/game_states.yaml`` registers it under the name that the data's column ``agent_name`` has.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.trainer.siop.rollouts.game_loop import VerifiedGameLoop, _Play, outcome_of
from verl.trainer.siop.rollouts.rows import ACTIONS, GAME, GROUP, VALIDATES
from verl.utils.siop.envs.games import Judge, Step
from verl.utils.siop.errors import GameError, RolloutError


class VerifiedStateLoop(VerifiedGameLoop):
    """A prompt is the present state alone, without earlier turns; the answer to it is one action.

    At each state of a training ``candidates`` actions are drawn and judged, each as if it were played. One with the
    highest score is played, by chance among several, and all are learnt from: they are compared with each other
    (``extra_fields["group"]``), for they answer the same prompt. An evaluation draws one. As in VPR's own trainings
    (arXiv 2605.10325).

    A game's outcome is that of the actions that were played; ``oracle_rate``, ``oracle_error`` and ``invalid`` are over
    all that were drawn. If the length limit cuts all of a state's actions, the game ends there.

    Args:
        candidates: K, from 2.

    Raises:
        GameError: a wrong option.
        RolloutError: a prompt does not end with the board, so that the next one cannot take its place; or the workers
            are not ours.
    """

    def __init__(self, *args: Any, candidates: int = 4, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.judge_of({"candidates": candidates})
        self.candidates = candidates

    @classmethod
    def judge_of(cls, options: Mapping[str, Any]) -> Judge:
        candidates = options.get("candidates", 4)
        if type(candidates) is not int or not 2 <= candidates <= 1024:
            raise GameError(f"candidates={candidates!r} is not allowed; choose a whole number from 2 to 1024")
        return super().judge_of(options)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> list[AgentLoopOutput]:  # type: ignore[override]
        extra = kwargs["extra_info"]
        seed = f"{extra['spec']} {kwargs.get('global_steps')} {kwargs.get('session_id')}"
        env, rng = self._env(extra, seed), random.Random(seed)
        before, opening = _opening(kwargs["raw_prompt"], env.rules.show())
        validates = VALIDATES.get()
        if validates is None:
            raise RolloutError(
                "the agent loop of states has to know whether it evaluates: "
                "actor_rollout_ref.rollout.agent.agent_loop_manager_class must be SiopAgentLoopManager"
            )
        width = 1 if validates else self.candidates
        outputs: list[AgentLoopOutput] = []
        steps: list[Step] = []
        scores: list[float] = []
        played: list[str] = []
        cut = False
        while not env.done and not cut:
            messages = [*before, {**opening, "content": opening["content"] + env.rules.show()}]
            ids = await self.ct_build_initial_tokens(messages)
            tried = [(env.branch(), _Play(messages, list(ids))) for _ in range(width)]
            found = await asyncio.gather(
                *(self._act(branch, play, sampling_params, uuid4().hex) for branch, play in tried)
            )
            best = max((step.score for step in found if step is not None), default=None)
            highest = [i for i, step in enumerate(found) if step is not None and step.score == best]
            chosen = rng.choice(highest) if highest else 0
            # What is played comes last, here as in the whole: verl takes the outcome of the last one for all.
            order = [*(i for i in range(width) if i != chosen), chosen]
            for i in order:
                play = tried[i][1]
                outputs.append(self._output(play, extra))
                outputs[-1].extra_fields |= {
                    GROUP: len(played),
                    GAME: {**outputs[-1].extra_fields[GAME], "played": list(played)},
                }
                scores += play.scores
            steps += [step for i in order if (step := found[i]) is not None]
            cut = not highest
            env, play = tried[chosen]
            played += play.texts
        info = outcome_of(steps, scores, cut, extra)
        outputs[-1].reward_score, outputs[-1].extra_fields["reward_extra_info"] = info["success"], info
        if width == 1:
            outputs[-1].extra_fields[ACTIONS] = played
        return outputs


def _opening(prompt: Any, board: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages before the one that ends with the board, and that one without it."""
    *before, last = (dict(message) for message in prompt)
    content = last["content"]
    if not isinstance(content, str) or not content.endswith(board):
        raise RolloutError(f"a prompt does not end with its board, so no other can take its place: {content!r:.200}")
    return before, {**last, "content": content.removesuffix(board)}
