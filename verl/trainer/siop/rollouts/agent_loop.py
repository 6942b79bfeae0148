"""verl's tool agent loop, which tells the model about calls that could not be read and counts what became of them all.

The training configuration names :class:`SiopAgentLoopManager`
(``actor_rollout_ref.rollout.agent.agent_loop_manager_class``); its workers import this module, which registers the loop
``siop_tool_agent``, and report the first cause of a failed rollout to the trainer.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import ray
import transfer_queue as tq
from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.tool_agent_loop import AgentState, ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall
from verl.tools.control_tokens import neutralise
from verl.tools.schemas import ToolResponse
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.trainer.siop.rollouts.rows import VALIDATES
from verl.trainer.siop.rollouts.tool_calls import FIELD, ToolRecord, faults, json_fault, message
from verl.utils.reward_score.siop_reward import ANSWER
from verl.utils.siop.errors import RolloutError
from verl.utils.siop.turn_utils import extract_answer, get_assistant_turn_ranges, opens_thinking, special_tokens

AGENT_LOOP = "siop_tool_agent"
# verl's own loop, which data sets made for verl name in every row.
UPSTREAM = "tool_agent"
MAX_CAUSE_CHARS = 1000


class AnsweredCall(FunctionCall):
    """Stands among a turn's calls for one that no tool can execute.

    Args:
        answer: what the model is told. Nothing in it is the model's own text: that would come back to it as if a tool
            had said it, and count as evidence.
        outcome: where it is counted, a field of :class:`~verl.trainer.siop.rollouts.tool_calls.ToolRecord`; empty if
            it was counted when the turn was read.
    """

    answer: str
    outcome: str = ""


@register(AGENT_LOOP)
class SiopToolAgentLoop(ToolAgentLoop):
    """``agent_name=siop_tool_agent``.

    Token for token verl's ``tool_agent``, but a turn in which a call was tried and could not be read does not end the
    rollout: the model gets a tool message that says what is wrong, within the limits on turns, length and calls of a
    turn. What a tool says reaches the model without control tokens, whoever wrote the tool, and what is said about a
    call that failed repeats neither the call nor the tool's exception, which is in the log.
    ``extra_fields["siop_tools"]`` holds what became of all calls, a
    :class:`~verl.trainer.siop.rollouts.tool_calls.ToolRecord`.

    Raises:
        RolloutError: the rollout engine returned no tokens for the first turn, so there is no response.
    """

    tokenizer: Any

    async def _handle_pending_state(self, agent_data: Any, sampling_params: dict[str, Any]) -> AgentState:
        agent_data.siop_record = ToolRecord(offered=list(agent_data._active_tools))
        state = await super()._handle_pending_state(agent_data, sampling_params)
        agent_data.siop_record.thinking = opens_thinking(agent_data.prompt_ids, self.tokenizer)
        return state

    async def _handle_generating_state(
        self, agent_data: Any, sampling_params: dict[str, Any], ignore_termination: bool = False
    ) -> AgentState:
        state = await super()._handle_generating_state(agent_data, sampling_params, ignore_termination)
        if not agent_data.response_mask:
            # verl would return the prompt as the response.
            raise RolloutError("the rollout engine returned no tokens for the first turn")
        record: ToolRecord = agent_data.siop_record
        if agent_data.response_ids:
            record.executed_calls.append([])
        if self._cut(agent_data):
            record.truncated, state = 1, AgentState.TERMINATED
        else:
            state = await self._look_at_calls(agent_data, state)
        return self._finished(agent_data, state)

    async def _look_at_calls(self, agent_data: Any, state: AgentState) -> AgentState:
        """Count what the turn tried and what cannot be executed, and answer what could not be read."""
        record: ToolRecord = agent_data.siop_record
        tools = {name: tool.tool_schema for name, tool in agent_data._active_tools.items()}
        last_turn, full = self._no_turn_left(agent_data), self._full(agent_data)
        if last_turn or full:
            # verl may not have looked for calls.
            _, calls = await self.tool_parser.extract_tool_calls(agent_data.response_ids, list(tools.values()))
        else:
            calls = agent_data.tool_calls
        text = await self.loop.run_in_executor(
            None, lambda: self.tokenizer.decode(agent_data.response_ids, skip_special_tokens=False)
        )
        arguments = {name: list(schema.function.parameters.properties) for name, schema in tools.items()}
        found = faults(text, len(calls), self.tool_parser_name, arguments, record.thinking)
        record.unparsed += len(found)
        record.dropped += len(calls) if last_turn or full else max(0, len(calls) - self.max_parallel_calls)
        if full and not last_turn and (calls or found):
            record.truncated = 1  # there is no room for any answer
        if full:
            return AgentState.TERMINATED
        if last_turn or not found:
            return state
        name = next(iter(tools))
        special = [token for token in special_tokens(self.tokenizer).values() if token]
        agent_data.tool_calls = [
            *calls,
            *(
                AnsweredCall(
                    name=name,
                    arguments="{}",
                    answer=message(fault, self.tool_parser_name, name, _required(tools[name]), special),
                )
                for fault in found
            ),
        ]
        # Some templates name the call that a tool message answers.
        agent_data.messages[-1] = self._build_assistant_message(agent_data.messages[-1]["content"], agent_data)
        return AgentState.PROCESSING_TOOLS

    async def _handle_processing_tools_state(self, agent_data: Any) -> AgentState:
        record: ToolRecord = agent_data.siop_record
        agent_data.siop_executed = []
        before = agent_data.prompt_ids, agent_data.response_mask, agent_data.response_logprobs
        state = await super()._handle_processing_tools_state(agent_data)
        if state != AgentState.TERMINATED and self._full(agent_data):
            # The engine would refuse the context. As verl does where the response is full, the observation goes.
            agent_data.prompt_ids, agent_data.response_mask, agent_data.response_logprobs = before
            agent_data.user_turns -= 1
            state = AgentState.TERMINATED
        # Calls of a turn run at the same time and end in any order.
        ran = [call for call in agent_data.tool_calls if any(call is other for other in agent_data.siop_executed)]
        record.executed_calls[-1] = [(call.name, call.arguments) for call in ran]
        if state == AgentState.TERMINATED:
            record.truncated = 1
        return self._finished(agent_data, state)

    async def _call_tool(
        self, tool_call: FunctionCall, tools_kwargs: dict[str, Any], agent_data: Any
    ) -> tuple[ToolResponse, float, dict]:
        record: ToolRecord = agent_data.siop_record
        if isinstance(tool_call, AnsweredCall):
            if tool_call.outcome:
                record.count(tool_call.outcome)
            return ToolResponse(text=tool_call.answer), 0.0, {}
        response, reward, metrics = await super()._call_tool(tool_call, tools_kwargs, agent_data)
        schema = agent_data._active_tools[tool_call.name].tool_schema
        raised = (response.text or "").startswith(f"Error executing tool '{tool_call.name}'")
        outcome = _outcome(json.loads(tool_call.arguments), raised, metrics, schema)
        record.count(outcome)
        record.neutralised += _metric(metrics, "neutralised") or 0
        if outcome == "executed":
            agent_data.siop_executed.append(tool_call)
        if raised:
            wanted = f"; its arguments are {', '.join(schema.function.parameters.properties) or 'none'}"
            response.text = f"Error: {tool_call.name} failed" + (wanted if outcome == "invalid_arguments" else "")
        elif response.text:
            # After verl's cut, which may join what stood apart.
            response.text, found = neutralise(response.text)
            record.neutralised += found
        return response, reward, metrics

    def _build_assistant_message(self, content: str, agent_data: Any) -> dict[str, Any]:
        tools = agent_data._active_tools
        agent_data.tool_calls = [_checked(call, index, tools) for index, call in enumerate(agent_data.tool_calls)]
        message: dict[str, Any] = super()._build_assistant_message(content, agent_data)
        return message

    def _no_turn_left(self, agent_data: Any) -> bool:
        return bool(
            (self.max_assistant_turns and agent_data.assistant_turns >= self.max_assistant_turns)
            or (self.max_user_turns and agent_data.user_turns >= self.max_user_turns)
        )

    def _full(self, agent_data: Any) -> bool:
        """Whether not one more token fits."""
        context = self.rollout_config.max_model_len or self.prompt_length + self.response_length
        return len(agent_data.response_mask) >= self.response_length or len(agent_data.prompt_ids) >= context

    def _cut(self, agent_data: Any) -> bool:
        """Whether the turn was cut: nothing more fits, and it does not end with the end token."""
        within = len(agent_data.response_mask) <= self.response_length
        ended = within and agent_data.prompt_ids[-1] == self.tokenizer.eos_token_id
        return self._full(agent_data) and not ended

    def _finished(self, agent_data: Any, state: AgentState) -> AgentState:
        if state == AgentState.TERMINATED:
            # Not before: verl takes the engine's fields over only while extra_fields is empty.
            agent_data.extra_fields[FIELD] = agent_data.siop_record.as_dict()
        return state


def _required(schema: Any) -> list[str]:
    parameters = schema.function.parameters
    return list(parameters.required) or list(parameters.properties)


def _checked(call: FunctionCall, index: int, tools: dict[str, Any]) -> FunctionCall:
    """The call, or what stands for it if it cannot be executed. Templates may write its name or id beside its result,
    so these are of our making."""
    if isinstance(call, AnsweredCall):
        return call
    known, fault = call.name in tools, json_fault(call.arguments)
    name = call.name if known else "unknown"
    call_id = call.tool_call_id
    if call_id is not None and not re.fullmatch(rf"(functions\.)?{re.escape(name)}(:\d{{1,4}})?", call_id, re.ASCII):
        call_id = f"functions.{name}:{index}"
    if known and fault is None:
        call.tool_call_id = call_id
        return call
    answer, outcome = f"Error: the arguments of {name} are {fault}.", "invalid_arguments"
    if not known:
        answer, outcome = f"Error: there is no such tool. There is {', '.join(tools) or 'none'}.", "unknown_tool"
    return AnsweredCall(name=name, arguments="{}", tool_call_id=call_id, answer=answer, outcome=outcome)


def _outcome(arguments: Any, raised: bool, metrics: Any, schema: Any) -> str:
    """The field of :class:`ToolRecord` in which a call counts."""
    invalid = _metric(metrics, "invalid_calls")
    if invalid is not None:  # the tool knows best
        return "invalid_arguments" if invalid else "executed"
    parameters = schema.function.parameters
    if not isinstance(arguments, dict) or not set(parameters.required) <= set(arguments):
        return "invalid_arguments"
    if raised:
        return "failed" if set(arguments) <= set(parameters.properties) else "invalid_arguments"
    return "executed"


def _metric(metrics: Any, name: str) -> int | None:
    """Sum of a tool's metrics ``name`` and ``…/name``; None if it has none."""
    values = [value for key, value in (metrics or {}).items() if key.rsplit("/", 1)[-1] == name]
    return int(sum(values)) if values else None


class AgentLoopWorkerTQ(agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # type: ignore[name-defined,misc]
    """verl's worker (of the same name, which process lists show), with our loop, the answers by the response mask for
    the reward function, and the cause of a failed rollout."""

    tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._failed: set[str] = set()

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], trajectory: dict[str, Any], *, agent_name: str, **kwargs: Any
    ) -> Any:
        agent_name = AGENT_LOOP if agent_name == UPSTREAM else agent_name
        VALIDATES.set(bool(trajectory["validate"]))  # of this session's task alone
        try:
            return await super()._run_agent_loop(sampling_params, trajectory, agent_name=agent_name, **kwargs)
        except Exception as error:
            uid = kwargs["uid"]
            if uid not in self._failed:
                self._failed.add(uid)
                partition_id = "val" if trajectory["validate"] else "train"
                tag = {"failure": describe(error), "failed_at": time.time()}
                await tq.async_kv_put(key=uid, partition_id=partition_id, tag=tag)
            raise

    async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
        for output in outputs if outputs[-1].reward_score is None else ():
            # The reward function gets text, which does not say who wrote what, nor its control tokens.
            turns = get_assistant_turn_ranges(output.response_mask)
            output.extra_fields[ANSWER] = await asyncio.to_thread(
                extract_answer, output.response_ids, turns, self.tokenizer, output.prompt_ids
            )
        await super()._compute_score(outputs, kwargs=kwargs)


class SiopAgentLoopManager(agent_loop_tq.AgentLoopManagerTQ):
    """``agent_loop_manager_class``: verl's manager with the workers above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(AgentLoopWorkerTQ)


def describe(error: BaseException) -> str:
    """Type and text of an error; of its cause, if it came from another process with that one's traceback."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return f"{type(cause).__name__}: {cause}"[:MAX_CAUSE_CHARS].rstrip(": ")
