"""Configuration of the search tools: the keys of their YAML, checked when a tool is built, without any service."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import httpx
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.utils.siop.errors import SiopConfigError


@dataclass(frozen=True)
class SearchConfig:
    """Keys that every search tool takes.

    Args:
        topk: passages per search.
        timeout_s: seconds for one attempt; the time until it is its turn does not count.
        max_retries: further attempts after a failed one.
        max_chars: length at which the result text is cut. verl cuts again, at
            ``rollout.multi_turn.max_tool_response_length``, so keep that at least as high.
    """

    # Names of the first release's tool configuration, which mean the same.
    aliases: ClassVar[Mapping[str, str]] = {
        "search_top_k": "topk",
        "request_timeout": "timeout_s",
        "timeout": "timeout_s",
    }

    topk: int = 3
    timeout_s: float = 30.0
    max_retries: int = 3
    max_chars: int = 4000

    def __post_init__(self) -> None:
        for key, low in (("topk", 1), ("max_retries", 0), ("max_chars", 1)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise SiopConfigError(f"search tool: {key} must be an integer of at least {low}, got {value!r}")
        timeout_s = self.timeout_s
        is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
        if not is_number or not 0 < timeout_s < math.inf:
            raise SiopConfigError(f"search tool: timeout_s must be a positive number, got {timeout_s!r}")


ConfigT = TypeVar("ConfigT", bound=SearchConfig)


def read_config(cls: type[ConfigT], tool: str, config: Mapping[str, Any]) -> ConfigT:
    """``config`` of a tool's YAML as a dataclass; verl's own key ``type`` is skipped.

    No message shows a value of a key that may be secret.

    Raises:
        SiopConfigError: an unknown key (the message lists the allowed ones), a key and its alias with different
            values, or a wrong value.
    """
    allowed = [field.name for field in fields(cls)]
    unknown = sorted(set(config) - {*allowed, *cls.aliases, "type"})
    if unknown:
        raise SiopConfigError(
            f"{tool}: unknown config key(s) {', '.join(unknown)}; allowed: {', '.join(allowed)}; "
            f"also known as: {', '.join(cls.aliases)}"
        )
    given: dict[str, str] = {}  # key as the dataclass has it: key as the configuration has it
    for written in config:
        if written == "type":
            continue
        key = cls.aliases.get(written, written)
        if key in given and config[given[key]] != config[written]:
            raise SiopConfigError(
                f"{tool}: {given[key]} and {written} mean the same and have different values; keep one of them"
            )
        given[key] = written
    return cls(**{key: config[written] for key, written in given.items()})


def check_schema(tool: str, schema: OpenAIFunctionToolSchema) -> None:
    """Checks what the model is told of a tool.

    Raises:
        SiopConfigError: it has no name, or requires a parameter that is not there.
    """
    function = schema.function
    if not function.name.strip():
        raise SiopConfigError(f"{tool}: tool_schema: function.name={function.name!r} is empty; models call it by name")
    missing = [name for name in function.parameters.required if name not in function.parameters.properties]
    if missing:
        raise SiopConfigError(
            f"{tool}: tool_schema: required={function.parameters.required}: {', '.join(missing)} must be among its "
            f"properties, which are {', '.join(function.parameters.properties)}"
        )


def check_url(tool: str, key: str, url: Any) -> None:
    """Checks an address in the configuration.

    Raises:
        SiopConfigError: it is not an absolute http(s) address, or its port is none.
    """
    try:
        parts = httpx.URL(url if isinstance(url, str) else "")
        port = 80 if parts.port is None else parts.port
        valid = parts.scheme in ("http", "https") and bool(parts.host) and 0 < port < 65536
    except httpx.InvalidURL:
        valid = False
    if not valid:
        # What stands before an @ may be a password.
        shown = url.rpartition("@")[2] if isinstance(url, str) else url
        raise SiopConfigError(f"{tool}: {key} must be an http(s) address with a port from 1 to 65535, got {shown!r}")


def shown_url(url: str) -> str:
    """The address without user, password and query string, for messages."""
    return str(httpx.URL(url).copy_with(userinfo=b"", query=None, fragment=None))
