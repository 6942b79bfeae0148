"""Length budgets of the agent loop: a rollout of scripted turns at every budget from one token to more than it needs.

A budget may cut the rollout anywhere, but never makes anything up: what is returned is a beginning of the whole rollout
that ends with a turn's token, and turns, calls, answer and rewards are those of that beginning.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from agent_loops import agent_loop
from hydra import compose, initialize_config_module
from method_helpers import Scorer
from method_helpers import run as rewards_of
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import ToolListWrap
from verl.tools.function_tool import FunctionTool
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.trainer.siop.rollouts.agent_loop import SiopToolAgentLoop
from verl.trainer.siop.rollouts.tool_calls import FIELD
from verl.utils.reward_score.siop_reward import compute_score, place_turn_rewards
from verl.utils.siop.siop_process_reward import Rollout
from verl.utils.siop.turn_utils import get_assistant_turn_ranges
from verl.workers.rollout.replica import TokenOutput

END = "<|im_end|>"
MUCH = 100_000


async def _search(query: str) -> str:
    """Says what it was asked."""
    return f"found {query}"


def _schema(name: str) -> OpenAIFunctionToolSchema:
    parameters = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "q"}},
        "required": ["query"],
    }
    function = {"name": name, "description": name, "parameters": parameters}
    return OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})


TOOL = FunctionTool("search", _search, _schema("search"), is_async=True)


def _call(query: str) -> str:
    return f"<tool_call>{json.dumps({'name': 'search', 'arguments': {'query': query}})}</tool_call>"


ANSWER = f"<answer>x</answer>{END}"
SCRIPTS = {
    "parallel results": [_call("a") + _call("b") + END, _call("c") + END, ANSWER],
    "an early answer is not the last": [f"<answer>x</answer>{_call('a')}{END}", f"hm {ANSWER}"],
    "a malformed call": [f"<tool_call>{{{END}", ANSWER],
}
# What a turn that goes over the budget looks like: verl cuts it, or the engine stops; which limit it is.
ENGINES = {
    "verl cuts": lambda prompt, budget: ({"response_length": budget, "max_model_len": None}, MUCH),
    "the engine stops": lambda prompt, budget: ({"response_length": budget, "max_model_len": None}, prompt + budget),
    "a short context": lambda prompt, budget: (
        {"response_length": MUCH, "max_model_len": prompt + budget},
        prompt + budget,
    ),
}


class Model:
    """Plays a script; like an engine, refuses a context that leaves no room, and stops where there is none left."""

    def __init__(self, tokenizer: Any, turns: Sequence[str], context: int) -> None:
        self.tokenizer, self.turns, self.context, self.count = tokenizer, list(turns), context, 0

    async def generate(self, *, prompt_ids: list[int], **kwargs: Any) -> TokenOutput:
        assert len(prompt_ids) < self.context, "no room to generate"
        ids = self.tokenizer.encode(self.turns.pop(0), add_special_tokens=False)[: self.context - len(prompt_ids)]
        log_probs = [-0.001 * (self.count + place) for place in range(len(ids))]  # which token each belongs to
        self.count += len(ids)
        return TokenOutput(token_ids=ids, log_probs=log_probs)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> Any:
    with initialize_config_module("verl.trainer.siop.config", version_base=None):
        overrides = ["data.train_files=x", "data.val_files=x", f"actor_rollout_ref.model.path={tiny_model}"]
        composed = compose("siop_trainer", overrides=overrides)
    composed.actor_rollout_ref.rollout.multi_turn.max_parallel_calls = 2
    return OmegaConf.create(OmegaConf.to_container(composed, resolve=False))


def _play(turns: Sequence[str], tokenizer: Any, config: Any, context: int, **rollout: Any) -> Any:
    for key, value in rollout.items():
        config.actor_rollout_ref.rollout[key] = value

    async def play() -> Any:
        model = Model(tokenizer, turns, context)
        loop = agent_loop(SiopToolAgentLoop, config, tokenizer, model, tools=ToolListWrap([TOOL]))
        return await loop.run({}, raw_prompt=[{"role": "user", "content": "who?"}])

    return asyncio.run(play())


def _kept(budget: int, turns: list[tuple[int, int]]) -> int:
    """Tokens that a budget leaves: a turn is cut, an observation after which nothing fits is not there at all."""
    kept = 0
    for start, end in turns:
        if start < budget:
            kept = min(end, budget)
    return kept


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_budget(script: str, engine: str, tokenizer: Any, config: Any) -> None:
    turns = SCRIPTS[script]
    whole = _play(turns, tokenizer, config, MUCH, response_length=MUCH, max_model_len=None)
    prompt, ids, mask = len(whole.prompt_ids), whole.response_ids, whole.response_mask
    ranges, size = get_assistant_turn_ranges(mask), len(ids)
    texts = [tokenizer.decode(ids[start:end]) for start, end in ranges]
    assert texts == turns and whole.response_logprobs is not None and whole.extra_fields[FIELD]["truncated"] == 0
    rollouts, answered = [], []
    for budget in range(1, size + 3):
        options, context = ENGINES[engine](prompt, budget)
        output = _play(turns, tokenizer, config, context, **options)
        kept = _kept(budget, ranges)
        assert output.prompt_ids == whole.prompt_ids
        assert (output.response_ids, output.response_mask) == (ids[:kept], mask[:kept]), budget
        assert output.response_logprobs == whole.response_logprobs[:kept], budget
        record = output.extra_fields[FIELD]
        assert record["truncated"] == (kept < size), budget
        # A turn has its calls, or those that it could be seen to try, if it is whole; none that it was not seen to try.
        begun = [end for start, end in ranges if start < kept]
        complete = [number for number, end in enumerate(begun) if end <= kept]
        assert len(record["executed_calls"]) == len(begun) == len(get_assistant_turn_ranges(output.response_mask))
        assert record["calls"] == sum(turns[number].count("<tool_call>") for number in complete), budget
        queries = [[json.loads(a)["query"] for _, a in calls] for calls in record["executed_calls"]]
        for number, found in enumerate(queries):
            executed = [query for query in "abc" if _call(query) in turns[number]]
            # Those of the last turn, whose observation did not fit, ran unless the turn itself left no room.
            assert found == executed or (number == len(begun) - 1 and found == [])
        # The answer is that of the last turn, if all of it is there.
        last = tokenizer.decode(output.response_ids[ranges[len(begun) - 1][0] :])
        text = tokenizer.decode(output.response_ids, skip_special_tokens=True)
        answered.append("</answer>" in last)
        assert compute_score("d", text, "x", dict(output.extra_fields))["em"] == float(answered[-1]), budget
        rollouts.append(Rollout("u", "who?", output.prompt_ids, output.response_ids, output.response_mask, None))
    assert 0 < sum(answered) < len(answered)

    found = rewards_of(rollouts, Scorer(), tokenizer)
    for rollout, rewards, has_answer in zip(rollouts, found.turn_rewards, answered, strict=True):
        assert len(rewards) == (len(get_assistant_turn_ranges(rollout.response_mask)) if has_answer else 0)
    placed = place_turn_rewards(found.turn_rewards, [rollout.response_mask for rollout in rollouts])
    for rollout, on_tokens in zip(rollouts, placed, strict=True):
        ends = {end - 1 for _, end in get_assistant_turn_ranges(rollout.response_mask)}
        assert {index for index, reward in enumerate(on_tokens.tolist()) if reward} <= ends


@pytest.mark.parametrize("room", [-1, 0, 1])
def test_an_observation_that_ends_at_the_budget(room: int, tokenizer: Any, config: Any) -> None:
    turns = SCRIPTS["parallel results"]
    whole = _play(turns, tokenizer, config, MUCH, response_length=MUCH, max_model_len=None)
    (_, first), (second, _), _ = get_assistant_turn_ranges(whole.response_mask)
    output = _play(turns, tokenizer, config, MUCH, response_length=second + room, max_model_len=None)
    # It ends before the budget with room for a token of the next turn, or is not there.
    assert len(output.response_ids) == (second + 1 if room == 1 else first)
    assert output.extra_fields[FIELD]["truncated"] == 1 and output.extra_fields[FIELD]["executed"] == 2
