"""Round trips: what a chat template writes, verl's parsers and the method must read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.trainer.siop.checks.policy import Policy
from verl.trainer.siop.rollouts.tool_calls import FORMS
from verl.utils.siop.credit.config import AUTO, SiopConfig
from verl.utils.siop.credit.probe import Prober, turn_form
from verl.utils.siop.data.chat import (
    MULTI_TURN,
    Messages,
    call_message,
    first_cause,
    reads_call,
    rendered_call,
    sample_arguments,
    tool_parsers,
)
from verl.utils.siop.envs.base import read_action
from verl.utils.siop.errors import GameError, SiopConfigError, SiopError
from verl.utils.siop.turn_utils import parse_answer

# Their templates write calls of earlier turns otherwise than the models make them, and so prove nothing about them.
NO_ROUND_TRIP = frozenset({"gpt-oss"})


def check_round_trips(policy: Policy, siop: SiopConfig | None, sample: str, warn: Callable[[str], None]) -> str:
    """Check that what the template writes can be read back: answers, references, tool calls and tool results.

    Args:
        policy: see there.
        siop: for the texts around a reference; None if no reference is scored.
        sample: text in the words of the data, for a call's argument and an observation.
        warn: gets what could not be checked.

    Raises:
        SiopConfigError: the call's format is not known, or reads something else than the template wrote; the message
            names the formats that fit.
    """
    if policy.scores_itself:
        return f"action tags{_check_action_tags(policy)}; the agent loop {policy.agent} scores rollouts itself"
    tags = "answer tags" + _check_answer_tags(policy, siop, sample, warn)
    if not policy.calls_tools:
        return f"{tags}; what the agent loop {policy.agent} calls is not known"
    parsers = tool_parsers()
    if policy.format not in parsers:
        raise SiopConfigError(
            f"{MULTI_TURN}.format={policy.format} is not allowed; choose one of {', '.join(sorted(parsers))}"
        )
    if not policy.tools:
        return f"{tags}; no tools, format {policy.format}"
    name, tool = next(iter(policy.tools.items()))
    arguments = sample_arguments(tool, sample)
    if policy.format not in NO_ROUND_TRIP:
        _check_call(policy, name, arguments, sample, warn)
    _check_result(policy, name, arguments, sample)
    return f"{tags}, a call of {name!r} in format {policy.format}, its result"


def _check_call(policy: Policy, name: str, arguments: dict[str, Any], sample: str, warn: Callable[[str], None]) -> None:
    call, writer = (
        rendered_call(policy, name, arguments, [{"role": "user", "content": sample}]),
        f"the chat template of {policy.path}",
    )
    if call is None:
        # Then the prompt has to show the form, and the policy to write it.
        call, writer = example_call(policy.format, name, arguments), "a policy"
    if call is None:
        warn(
            f"the chat template of {policy.path} writes no tool calls, so that {MULTI_TURN}.format={policy.format} "
            "could not be tried on it"
        )
        return
    if reads_call(policy, policy.format, call, name, arguments):
        return
    fitting = [form for form in sorted(tool_parsers()) if reads_call(policy, form, call, name, arguments)]
    advice = f"set it to {' or '.join(fitting)}"
    if not fitting:
        formats = ", ".join(sorted(tool_parsers()))
        advice = f"nor does any other ({formats}): set actor_rollout_ref.model.custom_chat_template"
    raise SiopConfigError(
        f"{MULTI_TURN}.format={policy.format} does not read the calls that {writer} writes; {advice}. It writes "
        f"{call[:300]!r}"
    )


def example_call(form: str, name: str, arguments: dict[str, Any]) -> str | None:
    """A call as this format writes it; None if it is written with control tokens."""
    example = FORMS[form].example if form in FORMS else None
    return example(name, arguments) if example else None


def _check_answer_tags(policy: Policy, siop: SiopConfig | None, sample: str, warn: Callable[[str], None]) -> str:
    """How references are probed, as text that goes on after "answer tags"; empty if none is scored."""
    tokenizer = policy.tokenizer
    ids = tokenizer(f"<answer> {sample} </answer>", add_special_tokens=False)["input_ids"]
    if not parse_answer(tokenizer.decode(ids)).strip():
        raise SiopConfigError(
            f"actor_rollout_ref.model.path={policy.path}: its tokenizer reads <answer> {sample} </answer> back as "
            f"{tokenizer.decode(ids)!r}, in which no answer is found"
        )
    if siop is None:
        return ""
    prompt = policy.prompt_ids([{"role": "user", "content": sample}], policy.schemas())
    try:
        prober = Prober(tokenizer, siop)
        prober.reference(sample, prompt)
        prober.openings(prompt, prompt[-1:], [1], [1])
    except (SiopError, ValueError) as error:
        raise SiopConfigError(f"algorithm.siop_reference_prefix, siop_reference_suffix: {error}") from error
    (prefix, suffix), unknown = prober.texts(prompt), tokenizer.unk_token_id
    if unknown is not None and unknown in tokenizer(prefix, add_special_tokens=False)["input_ids"]:
        raise SiopConfigError(
            f"algorithm.siop_reference_prefix={prefix!r} has words that the tokenizer of {policy.path} does not know, "
            "so that references would be scored after a text without meaning; take words of its vocabulary"
        )
    form = turn_form(tokenizer)
    if form is not None and not form.header and siop.siop_probe_opening and siop.siop_boundary != "observation":
        warn(
            f"the chat template of {policy.path} writes nothing before a turn of the assistant: with algorithm."
            f"siop_boundary={siop.siop_boundary} support between the turns is measured right after the end of a turn, "
            f"{form.end.strip()!r}, where the model never answers; siop_boundary=observation measures it after results"
        )
    found = " (by the chat template)" if AUTO in (siop.siop_reference_prefix, siop.siop_reference_suffix) else ""
    return f", probes as {prefix + '…' + suffix!r}{found}"


def _check_action_tags(policy: Policy) -> str:
    """What an action looks like to the tokenizer, as text that goes on after "action tags"."""
    ids = policy.tokenizer("<action> 1 2 3 </action>", add_special_tokens=False)["input_ids"]
    text = policy.tokenizer.decode(ids, skip_special_tokens=True)
    try:
        found = read_action(text)
    except GameError:
        found = []
    if found != ["1", "2", "3"]:
        raise SiopConfigError(
            f"actor_rollout_ref.model.path={policy.path}: its tokenizer reads <action> 1 2 3 </action> back as "
            f"{text!r}, which is not that action"
        )
    return f", {len(ids)} tokens for an action"


def _check_result(policy: Policy, name: str, arguments: dict[str, Any], sample: str) -> None:
    """A tool's result must be appended to a rollout, by verl's own way of doing it."""
    user, schemas = {"role": "user", "content": sample}, policy.schemas()
    history = [user, call_message(name, arguments)]
    result = {"role": "tool", "content": sample}
    try:
        ids = policy.builder.build_initial_tokens([user], tools=schemas)
        merged = policy.builder.merge_context_tokens(history, [*history, result], ids, tools=schemas).token_ids
    except Exception as error:  # as in prompt_ids
        raise SiopConfigError(
            f"actor_rollout_ref.model.path={policy.path}: its chat template cannot render the result of a tool (a "
            f"message of role 'tool' after the assistant's): {first_cause(error)}"
        ) from error
    added = policy.tokenizer.decode(merged[len(ids) :])
    if "".join(sample.split()) not in "".join(added.split()):
        raise SiopConfigError(
            f"actor_rollout_ref.model.path={policy.path}: its chat template leaves out the result of a tool (a message "
            f"of role 'tool'): it writes {added[:300]!r}"
        )


def check_instructions(policy: Policy, messages: Messages, warn: Callable[[str], None]) -> None:
    """Warn if nothing tells the policy how to call a tool or to give its answer in ``<answer>``.

    It is no error: a policy may have learnt both before, and the first step shows whether it has.
    """
    prompt = policy.render(messages, True, [])
    missing = []
    if policy.tools and policy.calls_tools:
        silent = policy.render(messages, True, policy.schemas()) == prompt
        if silent and not any(name in prompt for name in policy.tools):
            name, tool = next(iter(policy.tools.items()))
            call = example_call(policy.format, name, sample_arguments(tool, "…"))
            missing.append(
                f"how to call {' or '.join(map(repr, policy.tools))}, for the chat template of {policy.path} renders "
                f"no tools ({'as ' + repr(call) if call else 'in the form of ' + policy.format})"
            )
    if "<answer>" not in prompt and not policy.scores_itself:
        missing.append("that the answer goes into <answer> … </answer>")
    if missing:
        warn(
            f"the prompt does not say {', nor '.join(missing)}: unless the policy has learnt it already, no rollout "
            "will search or count. Write it into the system message or the question"
        )
