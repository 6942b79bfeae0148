"""Scoring service: an HTTP front (FastAPI) over Ray workers that hold the scorer language model and the NLI model.

Endpoints: ``GET /health``, ``POST /support``, ``POST /score``, ``POST /cluster``, ``POST /nli_score``, ``GET /metrics``
and ``GET /docs``. Whatever cannot be scored is an error with its reason, never a made-up score.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from verl.utils.siop.errors import InvalidRequest, SequenceTooLong, SiopError
from verl.utils.siop.http.json_body import JsonRoute, answer_invalid
from verl.utils.siop.scorer.engines.base import EngineInfo, RolloutQuery, SupportResult, check_rollouts, too_long
from verl.utils.siop.scorer.engines.nli import AnswerGroup
from verl.utils.siop.scorer.metrics import Metrics
from verl.utils.siop.scorer.pool import NoWorker, WorkerPool
from verl.utils.siop.scorer.wire import (
    MAX_ITEM_TOKENS,
    MAX_ITEMS,
    ClusterAnswer,
    ClusterBody,
    ClusterGroup,
    ClusterGroupAnswer,
    ClusterInfo,
    ErrorAnswer,
    NliBody,
    RolloutFailure,
    ScoreBody,
    ScoresAnswer,
    SupportAnswer,
    SupportBody,
)
from verl.utils.siop.scorer.workers import NliResult

logger = logging.getLogger("siop.scorer")

Body = TypeVar("Body", SupportBody, ScoreBody)
Value = TypeVar("Value")

MAX_SHOWN = 5  # items that are too long, in a message
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ErrorAnswer}
    for status, text in {
        400: "The body does not match its Content-Digest",
        401: "Missing or wrong bearer token (where SIOP_API_TOKEN is set)",
        408: "The body did not arrive in time",
        413: "The body or one of its items is too large, or a text or sequence is too long for the model",
        415: "The body is encoded otherwise than by gzip",
        422: "The request is not valid: the message names the field",
        503: "Too many requests at once, or no worker is up; Retry-After says how many seconds to wait",
    }.items()
}


router = APIRouter(route_class=JsonRoute)
post = functools.partial(router.post, responses=REFUSALS)


def create_app(
    pool: WorkerPool, max_items: int = MAX_ITEMS, max_item_tokens: int = MAX_ITEM_TOKENS
) -> tuple[FastAPI, Metrics]:
    """The endpoints over a pool of workers, and what they count; :class:`Guard` adds the other limits.

    Args:
        pool: the workers.
        max_items: rollouts, items, groups or pairs of a request; more get 422.
        max_item_tokens: token ids of one rollout or item with its references; more get 413.
    """
    app = FastAPI(title="SIOP scorer", description=__doc__, version="1")
    app.state.pool, app.state.metrics = pool, Metrics(pool)
    app.state.max_items, app.state.max_item_tokens = max_items, max_item_tokens
    app.exception_handler(RequestValidationError)(answer_invalid)
    app.exception_handler(SiopError)(_failed)
    app.exception_handler(Exception)(_crashed)
    app.include_router(router)
    return app, app.state.metrics


def _error(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


async def _failed(request: Request, error: SiopError) -> JSONResponse:
    if isinstance(error, SequenceTooLong):
        return _error(413, str(error))
    if isinstance(error, InvalidRequest):
        return _error(422, str(error))
    if isinstance(error, NoWorker):
        return _error(503, str(error), {"Retry-After": "5"})
    logger.error("%s failed: %s", request.url.path, error)
    return _error(500, f"{type(error).__name__}: {error}")


async def _crashed(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s failed", request.url.path, exc_info=error)
    return _error(500, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


@router.get("/health")
async def health(request: Request) -> Response:
    """200 when every worker is ready, 503 while loading or degraded; ``num_workers`` counts scoring workers."""
    pool: WorkerPool = request.app.state.pool
    if (info := pool.info) is None:
        return JSONResponse({"status": "loading", "num_workers": pool.num_up}, 503)
    if not pool.is_complete:
        return JSONResponse({"status": "degraded", "num_workers": pool.num_up}, 503)
    return JSONResponse(
        {
            "status": "healthy",
            "num_workers": pool.num_up,
            "engine": info.engine.engine,
            "model": info.engine.model,
            "max_model_len": info.engine.max_model_len,
            "vocab_size": info.engine.vocab_size,
            "tokenizer": info.engine.tokenizer,
            "nli": info.nli,
        }
    )


@post("/support", response_model=SupportAnswer)
async def support(request: Request, body: SupportBody) -> Response:
    """Mean log-probability of every reference at every boundary of every rollout.

    Rollouts that are too long for the model are listed in ``errors``; if all of them are, the status is 413.
    """
    started = time.perf_counter()
    result = await _scored(request, _support_queries, body)
    failed = result.errors
    if failed and len(failed) == len(body.rollouts):
        raise _too_long("rollouts", failed)
    return _json(
        SupportAnswer(
            support=[None if index in failed else scores for index, scores in enumerate(result.support)],
            computed_tokens=result.computed_tokens,
            requested_tokens=result.requested_tokens,
            elapsed_ms=_elapsed_ms(started),
            errors=[RolloutFailure(rollout=i, detail=detail) for i, detail in failed.items()] or None,
        )
    )


@post("/score", response_model=ScoresAnswer)
async def score(request: Request, body: ScoreBody) -> Response:
    """Mean log-probability of a range of each item's response; shared prefixes are computed once.

    One item that is too long for the model makes the status 413.
    """
    started = time.perf_counter()
    result = await _scored(request, _score_queries, body)
    return _json(ScoresAnswer(scores=[item[0][0] for item in result.support], elapsed_ms=_elapsed_ms(started)))


@post("/cluster", response_model=ClusterAnswer)
async def cluster(request: Request, body: ClusterBody) -> Response:
    """Clusters of each group's answers by meaning."""
    started = time.perf_counter()
    pool, _ = _loaded(request)
    groups = [AnswerGroup(group.question, group.answers, group.strict) for group in body.groups]
    clusters = _counted(request, await pool.cluster(groups))
    results = [_clustered(group, ids) for group, ids in zip(body.groups, clusters, strict=True)]
    return _json(ClusterAnswer(results=results, elapsed_ms=_elapsed_ms(started)))


@post("/nli_score", response_model=ScoresAnswer)
async def nli_score(request: Request, body: NliBody) -> Response:
    """P(premise entails hypothesis) of each pair."""
    started = time.perf_counter()
    pool, _ = _loaded(request)
    scores = _counted(request, await pool.entailment([(pair.premise, pair.hypothesis) for pair in body.pairs]))
    nli = pool.info.nli if pool.info else None
    return _json(ScoresAnswer(scores=scores, elapsed_ms=_elapsed_ms(started), nli=nli))


@router.get("/metrics")
async def prometheus(request: Request) -> Response:
    """Counters in Prometheus' text format."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _loaded(request: Request) -> tuple[WorkerPool, EngineInfo]:
    pool: WorkerPool = request.app.state.pool
    if pool.info is None:
        raise NoWorker("the scorer is still loading its models")
    return pool, pool.info.engine


async def _scored(
    request: Request, queries: Callable[[Body, EngineInfo], list[RolloutQuery]], body: Body
) -> SupportResult:
    pool, info = _loaded(request)
    result = await pool.support(await asyncio.to_thread(queries, body, info))
    request.app.state.metrics.computed.inc(result.computed_tokens)
    request.app.state.metrics.requested.inc(result.requested_tokens)
    return result


def _support_queries(body: SupportBody, info: EngineInfo) -> list[RolloutQuery]:
    queries = [rollout.query() for rollout in body.rollouts]
    check_rollouts(queries, info)
    return queries


def _score_queries(body: ScoreBody, info: EngineInfo) -> list[RolloutQuery]:
    queries = [item.query() for item in body.items]
    try:
        check_rollouts(queries, info, "items")
    except InvalidRequest as error:
        # An item has one reference, which its fields call the response.
        message = str(error).replace(".references[0].token_ids", ".response_ids")
        raise InvalidRequest(message.replace(".references[0].start", ".ref_start")) from error
    if failed := too_long(queries, info):
        raise _too_long("items", failed)
    return queries


def _too_long(field: str, failed: Mapping[int, str]) -> SequenceTooLong:
    shown = "; ".join(f"{field}[{index}] is {message}" for index, message in list(failed.items())[:MAX_SHOWN])
    return SequenceTooLong(shown + (f"; and {len(failed) - MAX_SHOWN} more" if len(failed) > MAX_SHOWN else ""))


def _counted(request: Request, result: NliResult[Value]) -> list[Value]:
    request.app.state.metrics.nli_asked.inc(result.asked)
    request.app.state.metrics.nli_computed.inc(result.computed)
    return result.values


def _clustered(group: ClusterGroup, ids: list[int]) -> ClusterGroupAnswer:
    info = {}
    for cluster_id in range(max(ids, default=-1) + 1):
        members = [index for index, other in enumerate(ids) if other == cluster_id]
        info[str(cluster_id)] = ClusterInfo(
            count=len(members),
            frequency=len(members) / len(ids),
            reference=group.answers[members[0]],
            members=members,
        )
    return ClusterGroupAnswer(group_id=group.group_id, semantic_ids=ids, cluster_info=info)


def _json(answer: BaseModel) -> Response:
    # As it is: FastAPI would check it once more and build it in several passes on the event loop.
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


def _elapsed_ms(started: float) -> float:
    return (time.perf_counter() - started) * 1000
