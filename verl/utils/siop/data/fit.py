"""Fits prompts to a model: which preset its chat template asks for, and a rollout made of both that is read back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from verl.utils.siop.credit.config import SiopConfig
from verl.utils.siop.credit.probe import Prober
from verl.utils.siop.data.chat import (
    Chat,
    Messages,
    PromptError,
    build_tools,
    call_message,
    first_cause,
    reads_call,
    rendered_call,
    sample_arguments,
    tool_parsers,
)
from verl.utils.siop.data.prompts import PROMPTS, Prompt
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.tokenizer_digest import tokenizer_digest
from verl.utils.siop.turn_utils import (
    THINKING,
    extract_answer,
    extract_observations,
    get_assistant_turn_ranges,
    open_thinking,
    unpaired_thinking,
    without_thinking,
)

LONGEST_OF = 32  # so many of the questions with the most tokens are rendered to find the longest prompt
_EXAMPLE: Messages = [{"role": "user", "content": "Who wrote Emma?"}]


@dataclass(frozen=True)
class Fit:
    """A prompt and the model that it was fitted to.

    Args:
        chat: the model's template, with the options of the prompt.
        prompt: with the format in which the model writes its calls.
    """

    chat: Chat
    prompt: Prompt

    def identity(self) -> dict[str, str]:
        """What of the model and its tools decides what is built."""
        texts = {"chat_template": str(self.chat.tokenizer.chat_template), "tools": json.dumps(self.chat.schemas())}
        digest = {f"{name}_sha256": hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        return {"tokenizer_sha256": tokenizer_digest(self.chat.tokenizer), **digest}

    def tokens(self, question: str) -> int:
        """Tokens of the prompt of a question, tools included."""
        return len(self.chat.prompt_ids(self.prompt.messages(question), self.chat.schemas()))

    def longest(self, questions: Iterable[str]) -> int:
        """Tokens of the longest prompt, tools included; 0 without questions."""
        texts = list(questions)
        if not texts:
            return 0
        ids = self.chat.tokenizer(texts, add_special_tokens=False)["input_ids"]
        most = sorted(range(len(texts)), key=lambda i: -len(ids[i]))[:LONGEST_OF]
        return max(self.tokens(texts[i]) for i in most)


def load_chat(model: str, tool_config: str | None) -> Chat:
    """The tokenizer and chat template of a model, and the tools of a configuration.

    Raises:
        SiopConfigError: the model cannot be loaded or has no template, or the tools cannot be built.
    """
    from transformers import AutoConfig, AutoTokenizer
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        kind = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError) as error:
        raise SiopConfigError(f"--model {model}: no tokenizer can be loaded with its configuration: {error}") from error
    if not tokenizer.chat_template:
        raise SiopConfigError(f"--model {model}: the tokenizer has no chat template; use an instruction-tuned model")
    tools = build_tools(OmegaConf.create({"tool_config_path": tool_config})) if tool_config else {}
    try:
        builder = create_continuous_token_builder(tokenizer, hf_model_type=kind)
    except ValueError as error:
        raise SiopConfigError(f"--model {model}: {error}") from error
    return Chat(model, tokenizer, builder, tools, "")


def _with_options(chat: Chat, options: dict[str, Any]) -> Chat:
    builder = type(chat.builder)(chat.tokenizer, chat_template_kwargs=options)
    return dataclasses.replace(chat, builder=builder)


# ---------------------------------------------------------------------- the preset
def opening(chat: Chat, messages: Messages) -> str:
    """What the template writes to open the assistant's turn, the opening tag of thinking included where it does."""
    schemas = chat.schemas()
    try:
        closed, opened = chat.render(messages, False, schemas), chat.render(messages, True, schemas)
    except PromptError as error:
        raise SiopConfigError(f"--model {chat.path}: its chat template cannot render the prompt: {error}") from error
    return opened.removeprefix(closed)


def _thinking(chat: Chat) -> str:
    """``open``: the template has opened the thinking; ``closed``: it has written an empty one; else ``none``."""
    text = opening(chat, _EXAMPLE)
    if open_thinking(chat.tokenizer(text, add_special_tokens=False)["input_ids"], chat.tokenizer):
        return "open"
    return "closed" if any(closing in text for _, closing in THINKING) else "none"


def _tags(chat: Chat) -> tuple[str, str]:
    """Those that the template writes around thinking, of :data:`THINKING`; the first where it writes none."""
    text = opening(chat, _EXAMPLE) + opening(_with_options(chat, {"enable_thinking": False}), _EXAMPLE)
    return next((tags for tags in THINKING if any(tag in text for tag in tags)), THINKING[0])


def preset_for(chat: Chat) -> Prompt:
    """The preset that a model's chat template asks for.

    By rendering: a turn that opens thinking → hermes-prefilled; with an empty block → hermes-direct; with neither,
    but an empty block if ``enable_thinking=false`` → hermes-thinking; else → hermes-instruct.
    """
    found = _thinking(chat)
    if found == "none" and _thinking(_with_options(chat, {"enable_thinking": False})) == "closed":
        return PROMPTS["hermes-thinking"]
    return PROMPTS[{"open": "hermes-prefilled", "closed": "hermes-direct", "none": "hermes-instruct"}[found]]


def fit(chat: Chat, prompt: Prompt | None) -> Fit:
    """A prompt for a model, proved on an example.

    Args:
        chat: the model and its tools.
        prompt: the user's choice; None for :func:`preset_for`.

    Raises:
        SiopConfigError: prompt and template do not fit; the message says at which step, and which preset does.
    """
    chosen = prompt or preset_for(chat)
    if chosen.name in PROMPTS:
        chosen = chosen.with_tags(_tags(chat))
    chat = _with_options(chat, dict(chosen.template_kwargs))
    if chat.tools:
        name, tool = next(iter(chat.tools.items()))
        arguments = sample_arguments(tool, "Emma")
        call = _call(chat, chosen, name, arguments)
        chosen = chosen.model_copy(update={"format": _format(chat, chosen, call, name, arguments)})
    fitted = Fit(dataclasses.replace(chat, format=chosen.format or "hermes"), chosen)
    if chosen.name != "bare":
        try:
            _check_rollout(fitted)
        except SiopError as error:
            raise SiopConfigError(
                f"prompt {chosen.name} does not fit --model {chat.path}: {error}; its chat template asks for "
                f"{preset_for(_with_options(chat, {})).name}"
            ) from error
    return fitted


def _call(chat: Chat, prompt: Prompt, name: str, arguments: dict[str, Any]) -> str:
    """A call as the model's template writes it, without the thinking before and the end of the turn after it."""
    messages = prompt.messages("Who wrote Emma?")
    call = rendered_call(chat, name, arguments, messages)
    if call is None:
        if name not in chat.render(messages, True, chat.schemas()):
            raise SiopConfigError(
                f"--model {chat.path}: its chat template renders no tools, and the prompt {prompt.name} does not name "
                f"{name!r}: write the form of a call into a prompt of your own (--prompt FILE.yaml)"
            )
        call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    text = without_thinking(call)
    end = chat.tokenizer.eos_token
    return (text.partition(end)[0] if end else text).strip()


def _format(chat: Chat, prompt: Prompt, call: str, name: str, arguments: dict[str, Any]) -> str:
    forms = [prompt.format] if prompt.format else ["hermes", *sorted(set(tool_parsers()) - {"hermes"})]
    if prompt.format and prompt.format not in tool_parsers():
        raise SiopConfigError(
            f"format={prompt.format} is not allowed; choose one of {', '.join(sorted(tool_parsers()))}"
        )
    for form in forms:
        if reads_call(chat, form, call, name, arguments):
            return form
    raise SiopConfigError(
        f"--model {chat.path}: its chat template writes the call {call[:300]!r}, which {' and '.join(forms)} of verl's "
        "parsers do not read"
    )


def _check_rollout(fitted: Fit) -> None:
    """Make a rollout of the prompt, a call, its result and the probe's answer, and read it back as a run would."""
    chat, prompt = fitted.chat, fitted.prompt
    probe = {"siop_reference_prefix": prompt.reference_prefix, "siop_reference_suffix": prompt.reference_suffix}
    config = SiopConfig.from_algorithm({key: text for key, text in probe.items() if text is not None})
    prober = Prober(chat.tokenizer, config)
    messages, schemas = prompt.messages("Who wrote Emma?"), chat.schemas()
    answer, found = "Jane Austen", "Emma is a novel by Jane Austen"
    ids = chat.prompt_ids(messages, schemas)
    prefix, suffix = prober.texts(ids)
    turn = opening(chat, messages) + prefix + answer + suffix
    if tags := unpaired_thinking(turn):
        counted = " and ".join(f"{turn.count(tag)} {tag}" for tag in tags)
        raise SiopConfigError(f"the turn would be {turn!r}, with {counted}")
    start, prompt_ids, mask = len(ids), ids, []
    if chat.tools:
        name, tool = next(iter(chat.tools.items()))
        arguments = sample_arguments(tool, "Emma")
        thought = prefix.rpartition("<answer>")[0]
        text = thought + _call(chat, prompt, name, arguments) + (chat.tokenizer.eos_token or "")
        own = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        history = [*messages, call_message(name, arguments)]
        try:
            merged = chat.builder.merge_context_tokens(
                history, [*history, {"role": "tool", "content": found}], [*ids, *own], tools=schemas
            ).token_ids
        except Exception as error:  # a template may raise anything
            raise SiopConfigError(f"its template cannot render a tool's result: {first_cause(error)}") from error
        mask = [1] * len(own) + [0] * (len(merged) - start - len(own))
        ids = list(merged)
    end = prober.reference(answer, prompt_ids).token_ids
    response, mask = [*ids[start:], *end], mask + [1] * len(end)
    turns = get_assistant_turn_ranges(mask)
    observations = extract_observations(response, turns, chat.tokenizer)
    read = {
        "turns": (len(turns), 2 if chat.tools else 1),
        "answer": (extract_answer(response, turns, chat.tokenizer, prompt_ids), answer),
        # Some templates leave a header in it.
        "result": (found if any(found in text for text in observations) else observations, found if chat.tools else []),
    }
    for what, (got, wanted) in read.items():
        if got != wanted:
            raise SiopConfigError(f"of an example rollout the {what} would be read as {got!r}, not {wanted!r}")
