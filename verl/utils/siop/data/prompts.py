"""Prompts around a question, and the settings without which a model would not be read, or its support not measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from verl.utils.siop.credit.probe import ANSWER, DONE_THINKING
from verl.utils.siop.errors import SiopConfigError

QUESTION = "{question}"
Option: TypeAlias = str | bool | int | float | None
MAX_PROMPT_LENGTH = 1024  # of a run that is told nothing
ROLLOUT = "actor_rollout_ref.rollout.multi_turn"
# No name of a tool and no form of a call: the chat template renders both from the tool configuration.
SYSTEM = (
    "Answer the user's question. Reason step by step, briefly. Whenever you are not sure of a fact, call a tool "
    "instead of guessing: one call at a time, and read its result before you go on. You may call tools several times. "
    "As soon as you know the answer, give it alone between tags, in as few words as possible and without explanation, "
    "for example <answer>Paris</answer>. Answer a yes/no question with yes or no."
)


class Prompt(BaseModel):
    """What stands around a question, and what a run has to know about the model that reads it; None: as it is.

    Attributes:
        name: of the preset, or of the file.
        system: text of the system message; empty: there is none.
        user: text of the user's message, with ``{question}`` where the question goes.
        format: ``multi_turn.format``; None: the one that the template of the model writes.
        template_kwargs: ``data.apply_chat_template_kwargs``.
        reference_prefix: ``algorithm.siop_reference_prefix``; it ends the thinking that the template has opened, if it
            has, and opens the answer.
        reference_suffix: ``algorithm.siop_reference_suffix``.
        max_prompt_length: tokens of a prompt; raised to what the longest needs where a model is named.
        max_response_length: tokens of all turns and tool results.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    system: str = ""
    user: str = QUESTION
    format: str | None = None
    template_kwargs: dict[str, Option] = {}
    reference_prefix: str | None = None
    reference_suffix: str | None = None
    max_prompt_length: int | None = None
    max_response_length: int | None = None

    @field_validator("user")
    @classmethod
    def _has_the_question(cls, text: str) -> str:
        if text.count(QUESTION) != 1:
            raise ValueError(f"needs {QUESTION} once, where the question goes")
        return text

    def messages(self, question: str) -> list[dict[str, str]]:
        """The chat messages of a question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user.replace(QUESTION, question)}]

    def with_tags(self, tags: tuple[str, str]) -> Prompt:
        """The same for a model that writes these tags around its thinking, in the place of ``<think>``."""
        if self.reference_prefix is None:
            return self
        opening, closing = tags
        prefix = self.reference_prefix.replace("<think>", opening).replace("</think>", closing)
        return self.model_copy(update={"reference_prefix": prefix})

    @property
    def asks_for_tags(self) -> bool:
        """Whether it says that the answer goes into ``<answer>``; ``bare`` says nothing, for models that know."""
        return self.name == "bare" or "<answer>" in self.system + self.user

    @property
    def sha256(self) -> str:
        """Digest of all fields."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def _hermes(name: str, prefix: str, **template_kwargs: Option) -> Prompt:
    suffix = "\n</answer><|im_end|>"
    return Prompt(
        name=name,
        system=SYSTEM,
        template_kwargs=template_kwargs,
        reference_prefix=prefix,
        reference_suffix=suffix,
        max_prompt_length=MAX_PROMPT_LENGTH,
        max_response_length=6144,
    )


PROMPTS = {
    prompt.name: prompt
    for prompt in (
        # The model opens its thinking itself: Qwen3 (hybrid).
        _hermes("hermes-thinking", f"<think>\n{DONE_THINKING}"),
        # The template has opened it: Qwen3-…-Thinking-2507, Qwen3.5.
        _hermes("hermes-prefilled", DONE_THINKING),
        # The template writes an empty one: Qwen3 (hybrid) without thinking.
        _hermes("hermes-direct", ANSWER, enable_thinking=False),
        # There is none: Qwen3-…-Instruct-2507, Qwen2.5.
        _hermes("hermes-instruct", ANSWER),
        # The question alone, for models that have learnt the form already; every setting stays as it is.
        Prompt(name="bare"),
    )
}


def prompt_of(name: str) -> Prompt:
    """A preset by its name, or the prompt of a YAML file with the fields of :class:`Prompt`.

    Raises:
        SiopConfigError: no such preset or file, or a field of the file is wrong; the message names it.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise SiopConfigError(f"--prompt {name} is not allowed; choose one of {', '.join(PROMPTS)}, or a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"needs keys ({', '.join(Prompt.model_fields)}), got {type(content).__name__}")
        return Prompt.model_validate({"name": path.name, **content})
    except ValidationError as error:
        first = error.errors()[0]
        allowed = f"; allowed are {', '.join(Prompt.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise SiopConfigError(f"--prompt {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}{allowed}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise SiopConfigError(f"--prompt {name}: {' '.join(str(error).split())}") from error


def overrides(prompt: Prompt, longest: int = 0, tool_config: str | None = None) -> dict[str, Any]:
    """What a run on this data is told, Hydra key -> value; what is None stays as the run has it.

    Args:
        prompt: see there.
        longest: tokens of the longest prompt, 0 if no model has counted them.
        tool_config: path of the tool configuration, if one was given.
    """
    room = -(-longest // 256) * 256
    fits = longest <= (prompt.max_prompt_length or MAX_PROMPT_LENGTH)
    told: dict[str, Any] = {
        "data.apply_chat_template_kwargs": dict(prompt.template_kwargs) or None,
        "data.max_prompt_length": prompt.max_prompt_length if fits else room,
        "data.max_response_length": prompt.max_response_length,
        f"{ROLLOUT}.format": prompt.format or (None if prompt.reference_prefix is None else "hermes"),
        f"{ROLLOUT}.tool_config_path": tool_config,
        "algorithm.siop_reference_prefix": prompt.reference_prefix,
        "algorithm.siop_reference_suffix": prompt.reference_suffix,
    }
    return {key: value for key, value in told.items() if value is not None}


def overrides_text(told: dict[str, Any], made_by: str) -> str:
    """The text of ``overrides.yaml``."""
    head = (
        f"# {made_by}\n# Settings that belong to these prompts; DATA_DIR passes them on. A variable of the launchers,\n"
        "# or an override on the command line, wins.\n"
    )
    # JSON is YAML, and shows every line break.
    return head + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in told.items())
