"""The retrievers behind the search tools: that they answer, and what they say that they serve."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
from verl.tools.http_tool import HttpTool
from verl.tools.local_search_tool import LocalSearchConfig
from verl.tools.search_config import shown_url
from verl.utils.siop.errors import ServiceUnavailable, SiopConfigError

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_ATTEMPTS = 3
_PAUSE_S = 1.0


class RetrieverUnavailable(ServiceUnavailable):
    """Nothing answers at a retriever's address."""

    service = "retriever"

    def __str__(self) -> str:
        return (
            f"no answer from the retriever at {self.url} (RETRIEVER_URL): {self.last_error}; start it with "
            "bash launch_retriever.sh"
        )


def retrievers_of(tools: Mapping[str, Any]) -> list[str]:
    """The addresses of the retrievers that the tools ask, each replica's."""
    settings = [tool.settings for tool in tools.values() if isinstance(tool, HttpTool)]
    return list(dict.fromkeys(url for one in settings if isinstance(one, LocalSearchConfig) for url in one.replicas))


def unknown_services_of(tools: Mapping[str, Any]) -> list[str]:
    """The addresses of what other tools ask, as a search of the web: nothing there says what was searched."""
    others = [
        tool
        for tool in tools.values()
        if isinstance(tool, HttpTool) and not isinstance(tool.settings, LocalSearchConfig)
    ]
    return list(dict.fromkeys(tool.address for tool in others))


def healths_of(urls: Sequence[str], warn: Callable[[str], None] = logger.warning) -> dict[str, Any]:
    """What retrievers say about themselves under ``/health``, beside their endpoint.

    Args:
        urls: of :func:`retrievers_of`.
        warn: gets the addresses that answer without a usable one.

    Returns:
        address without secrets -> JSON object; null where there is none.

    Raises:
        RetrieverUnavailable: one does not answer at all, asked three times.
    """
    return {shown_url(url): _health(url, warn) for url in urls}


def _health(url: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
    address = httpx.URL(url).join("health")
    for left in reversed(range(_ATTEMPTS)):
        try:
            answer = httpx.get(address, timeout=_TIMEOUT_S, trust_env=False)
            found = answer.raise_for_status().json()
            if isinstance(found, dict):
                return found
            reason = f"no JSON object: {found!r:.100}"
            break
        except httpx.TransportError as error:
            if not left:
                what = f"{type(error).__name__}: {error}".rstrip(": ")
                raise RetrieverUnavailable(shown_url(url), _ATTEMPTS, what) from error
            time.sleep(_PAUSE_S)
        except (httpx.HTTPError, json.JSONDecodeError, UnicodeDecodeError) as error:
            reason = f"{type(error).__name__}: {error}"
            break
    where = shown_url(str(address))
    warn(f"{where} does not say what it serves, so that nothing proves what was searched: {reason}")
    return None


def check_replicas(healths: Mapping[str, Any]) -> None:
    """Check that all say the same about what they serve.

    Args:
        healths: of :func:`healths_of`.

    Raises:
        SiopConfigError: two do not; both are named, with the fields that differ.
    """
    (first, one), *others = list(healths.items()) or [("", None)]
    for url, other in others:
        if one != other:
            what = difference(one, other, f"at {first}", f"at {url}")
            raise SiopConfigError(f"the replicas of the retriever do not serve the same: {what}")


def difference(one: Any, other: Any, here: str, there: str) -> str:
    """What two answers of ``/health`` differ in, as ``documents is 9 here, 8 there``."""
    if one is None or other is None:
        return f"there is a usable /health {there if one is None else here}, and none {here if one is None else there}"
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return "; ".join(f"{name} is {one.get(name)!r:.80} {here}, {other.get(name)!r:.80} {there}" for name in names)
