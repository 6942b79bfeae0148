"""Asynchronous client of the scoring service: pooled connections, bounded concurrency, retries, checked answers."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import logging
import math
import os
import random
import re
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from verl.utils.siop.errors import ScorerError, ScorerUnavailable
from verl.utils.siop.http.content import MIN_COMPRESSED_BYTES, compress, content_digest, is_intact, offers_gzip
from verl.utils.siop.http.packed import MEDIA_TYPE as PACKED
from verl.utils.siop.http.packed import offers_packed, pack, pack_ids

if TYPE_CHECKING:
    from verl.utils.siop.credit.rollouts import SupportRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

LEXICAL = "lexical"  # what the service calls an NLI backend that compares words
# 400: what this client sends is well-formed, so it was spoiled on its way. 408: so was its end, or it was slow.
RETRIED_STATUS = (400, 408, 502, 503, 504)
CONNECT_TIMEOUT_S = 5.0
MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 60.0
# Rounding may lift a log-probability of 0 a little.
MAX_LOGPROB = 1e-3
# A call is split beyond these, so that it stays well under the server's limits and spreads over its workers.
REQUEST_TOKENS = 1_000_000
REQUEST_PAIRS = 4096


class _Retry(Exception):
    """A failure that another attempt may mend."""

    def __init__(self, message: str, retry_after_s: float | None = None, answered: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s, self.answered = retry_after_s, answered


class _Malformed(Exception):
    """An answer that is not what was asked for."""


class ScoringClient:
    """The scorer behind HTTP; implements ``SiopScorer``.

    Use it as ``async with ScoringClient(url) as scorer:`` inside the event loop. It may be created outside of a loop
    and used in several, one after the other: each loop gets its own connections on first use.

    Requests are pure, so every failure that may pass (no connection, a dropped one, a time-out, 502, 503, 504, a
    garbled message) is tried again with exponential backoff and jitter, at least ``Retry-After`` later where the server
    gives one. No method ever returns a value that the scorer did not send: bodies carry a digest both ways (RFC 9530),
    an answer must bear the id of its request, and its numbers must be as many as asked for and in range.

    Args:
        url: address of the service, as ``http://127.0.0.1:8390``.
        strict: equivalence of answers by entailment both ways; else by no contradiction and not both neutral.
        timeout_s: longest wait for the answer to one attempt.
        deadline_s: longest time of a request with all its attempts, default ``3 * timeout_s``; the time until it is
            its turn (``max_concurrency``) does not count.
        token: bearer token, default ``SIOP_API_TOKEN``.
        attempts: tries of each request; the default outlasts a restart of about a minute.
        max_concurrency: requests at once.
        backoff_s: pause before the second attempt; it doubles from there, up to 30 s, and is drawn between once and
            twice that.

    Attributes:
        computed_tokens: tokens that went through the scorer's model for the answers received so far.
        requested_tokens: tokens of the same scores as separate full sequences.
        nli: who gave the last evidence: ``lexical``, or the name of a model; None if there was none, or not said.

    Raises (all methods):
        ScorerUnavailable: no answer after the last attempt.
        ScorerError: the service refused the request, could not score one of its rollouts, or its answer is not valid.
    """

    def __init__(
        self,
        url: str,
        *,
        strict: bool = True,
        timeout_s: float = 600.0,
        deadline_s: float | None = None,
        token: str | None = None,
        attempts: int = 8,
        max_concurrency: int = 16,
        backoff_s: float = 0.5,
    ) -> None:
        self.url = url.rstrip("/")
        self._strict = strict
        self._timeout_s, self._attempts, self._backoff_s = timeout_s, attempts, backoff_s
        self._deadline_s = deadline_s if deadline_s is not None else 3 * timeout_s
        self._max_concurrency = max_concurrency
        token = token if token is not None else os.environ.get("SIOP_API_TOKEN")
        # A proxy that compresses would change the body, and so its digest.
        self._headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {token}"} if token else {})}
        self.computed_tokens = self.requested_tokens = 0
        self.nli: str | None = None
        self._gzip = self._packed = False  # until an answer offers it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None

    async def __aenter__(self) -> ScoringClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections of the running loop; the client can be used again afterwards."""
        http, loop = self._http, self._loop
        self._http = self._loop = self._slots = None
        if http is not None and loop is asyncio.get_running_loop():
            await http.aclose()

    def _connection(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if self._http is None or self._slots is None or self._loop is not loop:
            # Connections of another loop cannot be used, nor closed, from here.
            self._loop = loop
            self._slots = asyncio.Semaphore(self._max_concurrency)
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers=self._headers,
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # _attempt limits the rest
                limits=httpx.Limits(max_connections=self._max_concurrency),
                trust_env=False,  # the scorer is a neighbour: a proxy for the outside world is not the way to it
                event_hooks={"response": [self._note_offer]},
            )
        return self._http, self._slots

    async def _note_offer(self, response: httpx.Response) -> None:
        self._gzip, self._packed = offers_gzip(response.headers), offers_packed(response.headers)

    async def wait_ready(self, timeout_s: float = 300.0) -> dict[str, Any]:
        """Wait until every worker of the service is ready, with a progress line at once and then every 10 s.

        Returns:
            The JSON of ``/health``.
        """
        http, _ = self._connection()
        started, reported, patience = time.monotonic(), -math.inf, min(5.0, timeout_s)
        attempts = 0
        while True:
            attempts += 1
            try:
                response = await asyncio.wait_for(http.get("/health"), patience)
                state = f"HTTP {response.status_code} {response.text[:200]}"
                if response.status_code == 200:
                    state = f"not a scorer: {state}"
                    health = response.json()
                    if isinstance(health, dict) and health.get("status") == "healthy":
                        logger.info("scorer at %s is ready: %s", self.url, health)
                        return health
            except asyncio.TimeoutError:
                state = f"no answer within {patience:g} s"
            except httpx.TransportError as error:
                state = _describe(error)
            except (ValueError, RecursionError):
                pass  # no JSON
            waited = time.monotonic() - started
            if waited >= timeout_s:
                raise ScorerUnavailable(self.url, attempts, state)
            if waited - reported >= 10:
                reported = waited
                logger.info("waiting for the scorer at %s, %.0f of %.0f s: %s", self.url, waited, timeout_s, state)
            await asyncio.sleep(min(0.5, timeout_s))

    async def check_token(self) -> None:
        """Ask for a page that needs the token, where the service wants one; ``/health`` is open to all.

        Raises:
            ScorerError: the service refuses the token.
            ScorerUnavailable: no answer.
        """
        http, _ = self._connection()
        try:
            response = await asyncio.wait_for(http.get("/metrics"), CONNECT_TIMEOUT_S)
        except (asyncio.TimeoutError, httpx.TransportError) as error:
            raise ScorerUnavailable(f"{self.url}/metrics", 1, _describe(error)) from error
        if response.status_code in (401, 403):
            raise ScorerError(
                f"the scorer at {self.url} answers HTTP {response.status_code}, {_detail(response)}: set SIOP_API_TOKEN"
                " to the token that it was started with"
            )

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        """Cluster id of each answer, 0, 1, … in order of opening."""
        if not answers:
            return []

        def read(data: Any) -> list[int]:
            ids = _only(data["results"], 1)[0]["semantic_ids"]
            _only(ids, len(answers))
            opened = 0
            for index in ids:
                if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= opened:
                    raise _Malformed(f"cluster ids {str(ids)[:200]}")
                opened = max(opened, index + 1)
            return ids

        group = {"group_id": "0", "question": question, "answers": list(answers), "strict": self._strict}
        return await self._post("/cluster", {"groups": [group]}, read)

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        """P(premise entails hypothesis) of each (premise, hypothesis)."""

        async def chunk(part: Sequence[tuple[str, str]]) -> list[float]:
            def read(data: Any) -> list[float]:
                self.nli = data.get("nli")
                return _numbers(data["scores"], len(part), 0.0, 1.0)

            body = {"pairs": [{"premise": premise, "hypothesis": hypothesis} for premise, hypothesis in part]}
            return await self._post("/nli_score", body, read)

        parts = [pairs[start : start + REQUEST_PAIRS] for start in range(0, len(pairs), REQUEST_PAIRS)]
        return [score for scores in await asyncio.gather(*map(chunk, parts)) for score in scores]

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        """Mean log-probability of each reference at each boundary, ``[rollout][boundary][reference]``.

        Rollouts that follow each other with the same prompt go into one request.
        """

        async def chunk(start: int, part: list[SupportRequest]) -> list[list[list[float]]]:
            def read(data: Any) -> list[list[list[float]]]:
                support = _only(data["support"], len(part))
                if failed := data.get("errors"):
                    named = [f"rollouts[{start + int(error['rollout'])}] is {error['detail']}" for error in failed]
                    more = f"; and {len(named) - 5} more" if len(named) > 5 else ""
                    raise ScorerError(f"{self.url}/support: {'; '.join(named[:5])}{more}")
                for rollout, rows in zip(part, support, strict=True):
                    for row in _only(rows, len(rollout.boundaries)):
                        _numbers(row, len(rollout.references), -sys.float_info.max, MAX_LOGPROB)
                computed, requested = _numbers(
                    [data["computed_tokens"], data["requested_tokens"]], 2, 0, sys.float_info.max
                )
                self.computed_tokens += int(computed)
                self.requested_tokens += int(requested)
                return support

            body = {"rollouts": [_rollout_body(rollout, pack_ids if packed else list) for rollout in part]}
            return await self._post("/support", body, read, packed)

        packed = self._packed

        parts: list[list[SupportRequest]] = []
        starts: list[int] = []
        size = 0
        for index, rollout in enumerate(rollouts):
            tokens = len(rollout.prompt_ids) + len(rollout.response_ids)
            same_group = index > 0 and rollouts[index - 1].prompt_ids == rollout.prompt_ids
            if not parts or (size + tokens > REQUEST_TOKENS and not same_group):
                parts.append([])
                starts.append(index)
                size = 0
            parts[-1].append(rollout)
            size += tokens
        return [scores for support in await asyncio.gather(*map(chunk, starts, parts)) for scores in support]

    async def _post(self, path: str, body: dict[str, Any], read: Callable[[Any], T], packed: bool = False) -> T:
        """POST until it is answered; ``read`` checks the JSON and picks the result."""
        # By hand, not by tenacity: the deadline leaves out the waits for a slot, which no pause holds.
        http, slots = self._connection()
        content = pack(body) if packed else json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        kind = PACKED if packed else "application/json"
        headers = {"Content-Type": kind, "X-Request-Id": uuid.uuid4().hex[:12]}
        if self._gzip and len(content) >= MIN_COMPRESSED_BYTES:
            content = compress(content)
            headers["Content-Encoding"] = "gzip"
        headers["Content-Digest"] = content_digest(content)
        deadline = time.monotonic() + self._deadline_s
        for number in itertools.count(1):
            queued = time.monotonic()
            async with slots:
                started = time.monotonic()
                deadline += started - queued
                try:
                    return await self._attempt(http, path, content, headers, read, deadline - started)
                except _Retry as error:
                    failure = error
            backoff = min(self._backoff_s * 2 ** (number - 1), MAX_BACKOFF_S)
            pause = max(backoff, min(failure.retry_after_s or 0.0, MAX_RETRY_AFTER_S))
            pause += random.uniform(0.0, backoff)  # or all that failed together come back together
            if number >= self._attempts or time.monotonic() + pause >= deadline:
                break
            logger.warning("scorer %s%s: attempt %d of %d failed: %s", self.url, path, number, self._attempts, failure)
            await asyncio.sleep(pause)
        if failure.answered:
            raise ScorerError(f"{self.url}{path}: {failure}") from failure
        raise ScorerUnavailable(f"{self.url}{path}", number, str(failure)) from failure

    async def _attempt(
        self,
        http: httpx.AsyncClient,
        path: str,
        content: bytes,
        headers: dict[str, str],
        read: Callable[[Any], T],
        left_s: float,
    ) -> T:
        timeout_s = min(self._timeout_s, left_s)
        try:
            # httpx's own limits are for each read: a server that sends a byte now and then would hold us for ever.
            response = await asyncio.wait_for(http.post(path, content=content, headers=headers), timeout_s)
        except asyncio.TimeoutError as error:
            raise _Retry(f"no answer within {timeout_s:.4g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Retry(_describe(error)) from error
        if response.status_code in RETRIED_STATUS:
            raise _Retry(
                f"HTTP {response.status_code}: {_detail(response)}", _seconds(response.headers.get("Retry-After"))
            )
        if not is_intact(response.content, response.headers.get("Content-Digest")):
            raise _Retry("the answer does not match its Content-Digest")
        if response.headers.get("X-Request-Id", headers["X-Request-Id"]) != headers["X-Request-Id"]:
            raise _Retry("the answer is that of another request (X-Request-Id)")
        if response.status_code != 200:
            raise ScorerError(f"{self.url}{path}: HTTP {response.status_code}: {_detail(response)}")
        try:
            return read(response.json())
        except (_Malformed, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise _Retry(
                f"the answer is not valid ({type(error).__name__}: {str(error)[:200]}): {response.text[:200]}",
                answered=True,
            ) from error


def _rollout_body(rollout: SupportRequest, ids: Callable[[Sequence[int]], Any]) -> dict[str, Any]:
    return {
        "prompt_ids": ids(rollout.prompt_ids),
        "response_ids": ids(rollout.response_ids),
        "boundaries": rollout.boundaries,
        **({"openings": [ids(opening) for opening in rollout.openings]} if rollout.openings else {}),
        "references": [
            {"token_ids": ids(reference.token_ids), "start": reference.start, "end": reference.end}
            for reference in rollout.references
        ],
    }


def _only(values: Any, size: int) -> list[Any]:
    if not isinstance(values, list) or len(values) != size:
        raise _Malformed(f"a list of {size} was expected")
    return values


def _numbers(values: Any, size: int, low: float, high: float) -> list[float]:
    for value in _only(values, size):
        # NaN is in no range.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise _Malformed(f"{str(value)[:50]!r} is not a number from {low} to {high}")
    return values


def _seconds(header: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header, which gives them or a date (RFC 9110 section 10.2.3)."""
    if header is None or re.fullmatch("[0-9]+", header):
        return float(header) if header else None
    try:
        return email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _detail(response: httpx.Response) -> str:
    """The service's message: of validation errors, each field and what is wrong with it."""
    try:
        detail = response.json()["detail"]
        if isinstance(detail, list):
            detail = "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in detail)
        return str(detail)[:2000]
    except (ValueError, KeyError, TypeError, RecursionError):
        return response.text[:200]
