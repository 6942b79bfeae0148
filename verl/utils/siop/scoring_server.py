"""Scoring service: an HTTP front (FastAPI) over Ray workers that hold the scorer language model and the NLI model.

    python -m verl.utils.siop.scoring_server --model PATH [--nli-model PATH] [--port 8390]

Endpoints: ``GET /health``, ``POST /support``, ``POST /score``, ``POST /cluster``, ``POST /nli_score``, ``GET /metrics``
and ``GET /docs``. Whatever cannot be scored is an error with its reason, never a made-up score.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import importlib.util
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from verl.utils.siop.errors import InvalidRequest, SequenceTooLong, SiopConfigError, SiopError
from verl.utils.siop.http.content_digest import content_digest, is_intact
from verl.utils.siop.http.content_encoding import decompress
from verl.utils.siop.http.json_body import parse_body, route_class
from verl.utils.siop.http.limits import BodyRefused, Message, Receive, TimedHttpProtocol, read_body, replayed
from verl.utils.siop.http.limits import too_large as body_too_large
from verl.utils.siop.nli_clustering import entailment_index
from verl.utils.siop.scorer.engines.base import NO_MODEL, EngineInfo, Probe, RolloutQuery, check_rollouts, too_long
from verl.utils.siop.scorer.engines.lora import read_adapter
from verl.utils.siop.scorer.engines.nli import AnswerGroup
from verl.utils.siop.scorer.pool import NoWorker, WorkerPool
from verl.utils.siop.scorer.wire import (
    MAX_TEXT,
    ClusterAnswer,
    ClusterBody,
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
from verl.utils.siop.scorer.workers import ENGINES, LOG_FORMAT, NLI_BACKENDS, NliResult, WorkerInfo, WorkerSettings

logger = logging.getLogger("siop.scorer")

DEFAULT_PORT = 8390
GRACE_S = 30  # what is in flight at shutdown may take this long
MAX_ITEMS = 65_536
MAX_ITEM_TOKENS = 262_144
MAX_SHOWN_ERRORS = 20


class _Metrics:
    def __init__(self, pool: WorkerPool) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "siop_scorer_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "siop_scorer_request_seconds",
            "Time of a request",
            ["path"],
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self.in_flight = Gauge("siop_scorer_in_flight", "Requests being worked on", registry=self.registry)
        self.computed = Counter(
            "siop_scorer_computed_tokens", "Tokens that went through the model", registry=self.registry
        )
        self.requested = Counter(
            "siop_scorer_requested_tokens", "Tokens of the same scores as full sequences", registry=self.registry
        )
        self.nli_asked = Counter(
            "siop_scorer_nli_asked_pairs", "Pairs of texts that the NLI model was asked for", registry=self.registry
        )
        self.nli_computed = Counter(
            "siop_scorer_nli_computed_pairs", "Those that were not known yet", registry=self.registry
        )
        for name, what, value in (
            ("workers", "Scoring workers that are asked for", lambda: pool.num_workers),
            ("workers_up", "Scoring workers that are ready", lambda: pool.num_up),
            ("nli_workers", "NLI workers that are asked for", lambda: pool.num_nli_workers),
            ("nli_workers_up", "NLI workers that are ready", lambda: pool.num_nli_up),
        ):
            Gauge(f"siop_scorer_{name}", what, registry=self.registry).set_function(value)


Model = TypeVar("Model", bound=BaseModel)


def _error(status: int, detail: Any, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status_code=status, headers=headers)


def _json(answer: BaseModel) -> Response:
    """An answer as it is: FastAPI would check it once more and build it in several passes on the event loop."""
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


def create_app(
    pool: WorkerPool, max_items: int = MAX_ITEMS, max_item_tokens: int = MAX_ITEM_TOKENS
) -> tuple[FastAPI, _Metrics]:
    """The endpoints over a pool of workers; :class:`Guard` adds the other limits.

    Args:
        pool: the workers.
        max_items: rollouts, items, groups or pairs of a request; more get 422.
        max_item_tokens: token ids of one rollout or item with its references; more get 413.
    """

    def parse(body: bytes, model: type[Model]) -> Model:
        has_tokens = model in (SupportBody, ScoreBody)
        return parse_body(body, model, max_items, max_item_tokens if has_tokens else None)

    errors = {
        400: "The body does not match its Content-Digest",
        401: "Missing or wrong bearer token (where SIOP_API_TOKEN is set)",
        408: "The body did not arrive in time",
        413: "The body or one of its items is too large, or a text or sequence is too long for the model",
        415: "The body is encoded otherwise than by gzip",
        422: "The request is not valid: the message names the field",
        503: "Too many requests at once, or no worker is up; Retry-After says how many seconds to wait",
    }
    documented: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "model": ErrorAnswer} for status, text in errors.items()
    }
    app = FastAPI(title="SIOP scorer", description=__doc__, version="1")
    app.router.route_class = route_class(parse)
    metrics = _Metrics(pool)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without pydantic's echo of the input, which may be megabytes of token ids.
        errors = error.errors()
        detail = [{"loc": e["loc"], "msg": e["msg"], "type": e["type"]} for e in errors[:MAX_SHOWN_ERRORS]]
        if len(errors) > len(detail):
            detail.append(
                {"loc": ("body",), "msg": f"and {len(errors) - len(detail)} more errors", "type": "truncated"}
            )
        return _error(422, detail)

    @app.exception_handler(SiopError)
    async def _failed(request: Request, error: SiopError) -> JSONResponse:
        if isinstance(error, SequenceTooLong):
            return _error(413, str(error))
        if isinstance(error, InvalidRequest):
            return _error(422, str(error))
        if isinstance(error, NoWorker):
            return _error(503, str(error), {"Retry-After": "5"})
        logger.error("%s failed: %s", request.url.path, error)
        return _error(500, f"{type(error).__name__}: {error}")

    @app.exception_handler(Exception)
    async def _crashed(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s failed", request.url.path, exc_info=error)
        return _error(500, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def checked(rollouts: list[RolloutQuery], field: str, info: EngineInfo) -> list[RolloutQuery]:
        for index, rollout in enumerate(rollouts):
            if rollout.num_tokens > max_item_tokens:
                raise SequenceTooLong(
                    f"{field}[{index}] has {rollout.num_tokens} tokens, the limit is {max_item_tokens} "
                    "(--max-item-tokens)"
                )
        check_rollouts(rollouts, info, field)
        return rollouts

    def support_queries(body: SupportBody, info: EngineInfo) -> list[RolloutQuery]:
        queries = [
            RolloutQuery(
                rollout.prompt_ids,
                rollout.response_ids,
                rollout.boundaries,
                [Probe(reference.token_ids, reference.start, reference.end) for reference in rollout.references],
            )
            for rollout in body.rollouts
        ]
        return checked(queries, "rollouts", info)

    def score_queries(body: ScoreBody, info: EngineInfo) -> list[RolloutQuery]:
        empty = np.empty(0, dtype=np.int64)
        queries = [
            RolloutQuery(item.prompt_ids, empty, [0], [Probe(item.response_ids, item.ref_start, item.ref_end)])
            for item in body.items
        ]
        try:
            checked(queries, "items", info)
        except SequenceTooLong:
            raise
        except InvalidRequest as error:
            # An item has one reference, which its fields call the response.
            message = str(error).replace(".references[0].token_ids", ".response_ids")
            raise InvalidRequest(message.replace(".references[0].start", ".ref_start")) from error
        if failed := too_long(queries, info):
            raise SequenceTooLong(_too_long("items", failed))
        return queries

    def count_nli(result: NliResult[Any]) -> None:
        metrics.nli_asked.inc(result.asked)
        metrics.nli_computed.inc(result.computed)

    def loaded() -> WorkerInfo:
        if pool.info is None:
            raise NoWorker("the scorer is still loading its models")
        return pool.info

    @app.get("/health")
    async def health() -> Response:
        """200 when every worker is ready, 503 while loading or degraded; ``num_workers`` counts scoring workers."""
        if pool.info is None:
            return JSONResponse({"status": "loading", "num_workers": pool.num_up}, status_code=503)
        if not pool.is_complete:
            return JSONResponse({"status": "degraded", "num_workers": pool.num_up}, status_code=503)
        info = pool.info
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

    @app.post("/support", response_model=SupportAnswer, responses=documented)
    async def support(body: SupportBody) -> Response:
        """Mean log-probability of every reference at every boundary of every rollout.

        Rollouts that are too long for the model are listed in ``errors``; if all of them are, the status is 413.
        """
        started = time.perf_counter()
        rollouts = await asyncio.to_thread(support_queries, body, loaded().engine)
        result = await pool.support(rollouts)
        metrics.computed.inc(result.computed_tokens)
        metrics.requested.inc(result.requested_tokens)
        failed = result.errors
        if failed and len(failed) == len(rollouts):
            raise SequenceTooLong(_too_long("rollouts", failed))
        return _json(
            SupportAnswer(
                support=[None if index in failed else scores for index, scores in enumerate(result.support)],
                computed_tokens=result.computed_tokens,
                requested_tokens=result.requested_tokens,
                elapsed_ms=_elapsed_ms(started),
                errors=[RolloutFailure(rollout=i, detail=detail) for i, detail in failed.items()] or None,
            )
        )

    @app.post("/score", response_model=ScoresAnswer, responses=documented)
    async def score(body: ScoreBody) -> Response:
        """Mean log-probability of a range of each item's response; shared prefixes are computed once.

        One item that is too long for the model makes the status 413.
        """
        started = time.perf_counter()
        result = await pool.support(await asyncio.to_thread(score_queries, body, loaded().engine))
        metrics.computed.inc(result.computed_tokens)
        metrics.requested.inc(result.requested_tokens)
        return _json(ScoresAnswer(scores=[item[0][0] for item in result.support], elapsed_ms=_elapsed_ms(started)))

    @app.post("/cluster", response_model=ClusterAnswer, responses=documented)
    async def cluster(body: ClusterBody) -> Response:
        """Clusters of each group's answers by meaning."""
        started = time.perf_counter()
        loaded()
        clusters = await pool.cluster(
            [AnswerGroup(group.question, group.answers, group.strict) for group in body.groups]
        )
        count_nli(clusters)
        results = []
        for group, ids in zip(body.groups, clusters.values, strict=True):
            info = {}
            for cluster_id in range(max(ids, default=-1) + 1):
                members = [index for index, other in enumerate(ids) if other == cluster_id]
                info[str(cluster_id)] = ClusterInfo(
                    count=len(members),
                    frequency=len(members) / len(ids),
                    reference=group.answers[members[0]],
                    members=members,
                )
            results.append(ClusterGroupAnswer(group_id=group.group_id, semantic_ids=ids, cluster_info=info))
        return _json(ClusterAnswer(results=results, elapsed_ms=_elapsed_ms(started)))

    @app.post("/nli_score", response_model=ScoresAnswer, responses=documented)
    async def nli_score(body: NliBody) -> Response:
        """P(premise entails hypothesis) of each pair."""
        started = time.perf_counter()
        loaded()
        scores = await pool.entailment([(pair.premise, pair.hypothesis) for pair in body.pairs])
        count_nli(scores)
        return _json(ScoresAnswer(scores=scores.values, elapsed_ms=_elapsed_ms(started)))

    @app.get("/metrics")
    async def prometheus() -> Response:
        """Counters in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app, metrics


def _too_long(field: str, errors: Mapping[int, str]) -> str:
    shown = "; ".join(f"{field}[{index}] is {message}" for index, message in list(errors.items())[:5])
    return f"{shown}; and {len(errors) - 5} more" if len(errors) > 5 else shown


def _elapsed_ms(started: float) -> float:
    return (time.perf_counter() - started) * 1000


Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware: request ids, digests, access log, metrics, bearer token, body limit and concurrency limit.

    A body that does not match its ``Content-Digest`` (RFC 9530) gets 400; answers carry one. Bodies may come with
    ``Content-Encoding: gzip``, which every answer offers (RFC 7694).

    Args:
        app: the application.
        metrics: where to count.
        max_body_bytes: larger bodies get 413, unread where their length is declared.
        max_concurrency: POST requests beyond this many at once get 503 with ``Retry-After``.
        token: expected bearer token, None for no check. ``/health`` is always open.
        body_timeout_s: bodies that take longer to arrive get 408.
    """

    def __init__(
        self,
        app: Any,
        metrics: _Metrics,
        max_body_bytes: int,
        max_concurrency: int,
        token: str | None = None,
        body_timeout_s: float = 60.0,
    ) -> None:
        self._app, self._metrics = app, metrics
        self._max_body_bytes, self._max_concurrency, self._token = max_body_bytes, max_concurrency, token
        self._body_timeout_s = body_timeout_s
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given) else uuid.uuid4().hex[:12]
        status = 499  # that of a client that went away before its answer
        start: Message | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status, start
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = [(b"x-request-id", request_id.encode()), (b"accept-encoding", b"gzip")]
                start = {**message, "headers": [*message["headers"], *ours]}
                return
            if start is not None:  # held until the body is here, for its digest
                if not message.get("more_body"):
                    start["headers"].append((b"content-digest", content_digest(message.get("body", b"")).encode()))
                await send(start)
                start = None
            await send(message)

        is_work = scope["method"] == "POST"
        try:
            if self._token is not None and scope["path"] != "/health" and not self._authorized(headers):
                response = _error(401, "missing or wrong bearer token", {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send_with_id)
            elif is_work and self._in_flight >= self._max_concurrency:
                detail = f"{self._in_flight} requests are being worked on, the limit is {self._max_concurrency}"
                await _error(503, detail, {"Retry-After": "1"})(scope, receive, send_with_id)
            elif is_work:
                self._in_flight += 1
                self._metrics.in_flight.set(self._in_flight)
                try:
                    await self._with_body(scope, headers, receive, send_with_id)
                finally:
                    self._in_flight -= 1
                    self._metrics.in_flight.set(self._in_flight)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            known = scope["path"] in ("/health", "/support", "/score", "/cluster", "/nli_score", "/metrics")
            path = scope["path"] if known else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(seconds)
            level = logging.DEBUG if path in ("/health", "/metrics") else logging.INFO
            logger.log(
                level, "%s %r %d %.0f ms id=%s", scope["method"], scope["path"], status, 1000 * seconds, request_id
            )

    def _authorized(self, headers: dict[bytes, bytes]) -> bool:
        assert self._token is not None
        return hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {self._token}".encode())

    async def _with_body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._max_body_bytes, self._body_timeout_s)
        except BodyRefused as error:
            await _error(error.status, error.detail)(scope, receive, send)
            return
        if body is None:
            return
        # In a thread, as the parsing: a digest of 64 MB takes a while.
        if not await asyncio.to_thread(is_intact, body, headers.get(b"content-digest", b"").decode("latin-1")):
            await _error(400, "the body does not match its Content-Digest")(scope, receive, send)
            return
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if encoding not in ("identity", "gzip"):
            detail = f"Content-Encoding is {encoding[:40]!r}; gzip and identity are taken"
            await _error(415, detail)(scope, receive, send)
            return
        if encoding == "gzip":
            try:
                unpacked = await asyncio.to_thread(decompress, body, self._max_body_bytes)
            except ValueError as error:
                await _error(400, str(error))(scope, receive, send)
                return
            if unpacked is None:
                await _error(413, body_too_large(self._max_body_bytes))(scope, receive, send)
                return
            body = bytearray(unpacked)
        replay = replayed(body, receive)
        del body
        await self._app(scope, replay, send)


class _Server(uvicorn.Server):
    # uvicorn raises the signal again after a graceful stop, which would end the process before Ray is stopped.
    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


async def _serve(pool: WorkerPool, server: uvicorn.Server, sock: socket.socket) -> int:
    """Serve until a signal or until the models cannot be loaded; returns the exit code."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if server.should_exit:
            server.force_exit = True
        else:
            logger.info("stopping: requests in flight have %d s to finish", GRACE_S)
            server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)

    started = time.monotonic()
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    loading = asyncio.create_task(pool.load())
    watching: asyncio.Task[None] | None = None
    code = 0
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        try:
            loading.result()
        except SiopError as error:
            logger.error("the scorer cannot start: %s", error)
            code, server.should_exit = 1, True
        else:
            assert pool.info is not None
            logger.info(
                "ready after %.1f s: %d worker(s), model %s, NLI %s",
                time.monotonic() - started,
                pool.num_workers,
                pool.info.engine.model,
                pool.info.nli,
            )
            watching = asyncio.create_task(pool.watch())
    try:
        await serving
    finally:
        for task in (loading, watching):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.siop.scoring_server",
        description="Scoring service of SIOP: support of references by a language model, clusters and entailment by an "
        "NLI model, over HTTP.",
        epilog=f"A text may have {MAX_TEXT} characters. "
        "Environment: SIOP_API_TOKEN, if set, is the bearer token that every request but /health must bring; "
        "RAY_ADDRESS, if set, is the Ray cluster to join (default: a private local Ray).",
    )
    parser.add_argument("--model", required=True, help="scorer language model: a directory, a hub id, or none")
    parser.add_argument("--nli-model", help="NLI sequence classifier: a directory or a hub id (default: none)")
    parser.add_argument(
        "--nli-backend",
        choices=("auto", *NLI_BACKENDS),
        default="auto",
        help="lexical compares words and needs no model; auto: transformers with --nli-model, else lexical",
    )
    parser.add_argument(
        "--no-nli-self-test",
        action="store_true",
        help="take an NLI model that gets an obvious entailment or contradiction wrong (for untrained test models)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", *ENGINES),
        default="auto",
        help="engine of the scorer model; auto: vllm on GPUs where it is installed, else transformers",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        help="GPUs that share one model, vllm only (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        help="share of each GPU's memory that the scorer model may take (default: 0.85 with vllm, else no limit)",
    )
    parser.add_argument("--lora-path", help="LoRA adapter on top of the scorer model: a directory (default: none)")
    parser.add_argument(
        "--num-gpus", type=int, help="GPUs, --tensor-parallel-size for each worker; 0: CPU (default: all seen)"
    )
    parser.add_argument("--num-workers", type=int, default=1, help="workers on CPU (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of each worker (default: the CPUs shared out)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="weights of the scorer model; auto: float32 on CPU, the checkpoint's type on GPU",
    )
    parser.add_argument(
        "--max-model-len", type=int, help="longest prompt + response + reference in tokens (default: the model's limit)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the models")
    parser.add_argument(
        "--max-body-mb", type=float, default=64, help="largest request body; more get 413 (default: %(default)s)"
    )
    parser.add_argument(
        "--max-items",
        type=int,
        default=MAX_ITEMS,
        help="rollouts, items, groups or pairs of a request; more get 422 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-item-tokens",
        type=int,
        default=MAX_ITEM_TOKENS,
        help="token ids of one rollout or item with its references; more get 413 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-concurrency",
        type=int,
        default=64,
        help="requests at once; more get 503 with Retry-After (default: %(default)s)",
    )
    return parser


def _model_path(option: str, model: str) -> str:
    """The absolute path of a model directory (workers may run elsewhere), or a hub id as it is."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SiopConfigError(f"{option}: {model} holds no model (config.json is missing)")
        return str(path.resolve())
    if path.exists():
        raise SiopConfigError(f"{option}: {model} is not a model directory")
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise SiopConfigError(f"{option}: the model directory {model} does not exist")
    return model


def _check_nli_labels(model: str) -> None:
    """Refuse a local model that is no NLI model before anything is started for it."""
    path = Path(model) / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            entailment_index(
                {int(index): label for index, label in config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"}).items()}
            )
        except (ValueError, AttributeError) as error:
            raise SiopConfigError(f"--nli-model: {model}: {error}") from error


def _settings(args: argparse.Namespace) -> tuple[WorkerSettings, int, int]:
    """Validated worker settings, number of workers and GPUs per worker."""
    for option in (
        "num_workers",
        "max_concurrency",
        "threads",
        "max_model_len",
        "max_body_mb",
        "max_items",
        "max_item_tokens",
        "tensor_parallel_size",
    ):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise SiopConfigError(f"--{option.replace('_', '-')} must be more than 0, not {value}")
    if args.model == NO_MODEL and args.engine != "auto":
        raise SiopConfigError(f"--engine {args.engine} needs a language model, but --model is {NO_MODEL}")
    model = args.model if args.model == NO_MODEL else _model_path("--model", args.model)
    nli_backend = args.nli_backend
    if nli_backend == "auto":
        nli_backend = "transformers" if args.nli_model else "lexical"
    if nli_backend == "transformers" and not args.nli_model:
        raise SiopConfigError("--nli-backend transformers needs --nli-model")
    if nli_backend == "lexical" and args.nli_model:
        raise SiopConfigError(f"--nli-backend lexical uses no model, but --nli-model is {args.nli_model}")
    nli_model = _model_path("--nli-model", args.nli_model) if args.nli_model else None

    if nli_model:
        _check_nli_labels(nli_model)

    import torch

    seen = torch.cuda.device_count()
    num_gpus = args.num_gpus if args.num_gpus is not None else seen
    if num_gpus < 0 or (num_gpus > seen and not os.environ.get("RAY_ADDRESS")):
        raise SiopConfigError(f"--num-gpus is {num_gpus}, this machine has {seen}")
    engine = _engine(args, num_gpus)
    num_workers = num_gpus // args.tensor_parallel_size or args.num_workers
    settings = WorkerSettings(
        model=model,
        engine=engine,
        nli_model=nli_model,
        nli_backend=nli_backend,
        nli_self_test=not args.no_nli_self_test,
        device="cuda" if num_gpus else "cpu",
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        lora_path=str(Path(args.lora_path).expanduser().resolve()) if args.lora_path else None,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory=args.gpu_memory,
        trust_remote_code=args.trust_remote_code,
        threads=args.threads or max(1, (os.cpu_count() or 1) // num_workers),
    )
    return settings, num_workers, args.tensor_parallel_size if num_gpus else 0


def _engine(args: argparse.Namespace, num_gpus: int) -> str:
    """The engine that ``auto`` stands for, and whether the options of engines fit it."""
    size = args.tensor_parallel_size
    if args.model == NO_MODEL:
        for option in ("lora_path", "gpu_memory"):
            if getattr(args, option) is not None:
                raise SiopConfigError(f"--{option.replace('_', '-')} needs a language model, but --model is {NO_MODEL}")
        engine = NO_MODEL
    elif args.engine == "auto":
        engine = "vllm" if num_gpus and importlib.util.find_spec("vllm") else "transformers"
    else:
        engine = args.engine
    if engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise SiopConfigError(
            f"--engine vllm: vLLM is not installed in {sys.executable}; install the extra gpu (on CPU: "
            "bash scripts/setup_env.sh --vllm), or take --engine transformers"
        )
    if size > 1 and engine != "vllm":
        raise SiopConfigError(f"--tensor-parallel-size is {size}, but engine {engine} takes 1 only; vllm takes more")
    if size > 1 and (not num_gpus or num_gpus % size):
        raise SiopConfigError(f"--tensor-parallel-size is {size}, of which --num-gpus {num_gpus} is no multiple")
    if args.gpu_memory is not None:
        if not 0 < args.gpu_memory <= 1:
            raise SiopConfigError(f"--gpu-memory is {args.gpu_memory:g}, a share is more than 0 and at most 1")
        if not num_gpus:
            raise SiopConfigError(f"--gpu-memory is {args.gpu_memory:g}, but no GPU is used (--num-gpus 0)")
    if args.lora_path:
        read_adapter(str(Path(args.lora_path).expanduser()))
    return engine


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        # Only connections that wait to expire are no obstacle; a listener is.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Bound alone would let a second server bind too (SO_REUSEADDR) and fail only later.
        sock.listen(128)
    except (OSError, OverflowError) as error:
        raise SiopConfigError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    return sock


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM or Ctrl-C; returns the exit code, 1 for anything that keeps it from starting."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr, force=True)
    for noisy in ("uvicorn", "httpx", "ray"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    pool: WorkerPool | None = None
    try:
        settings, num_workers, gpus_per_worker = _settings(args)
        sock = _bind(args.host, args.port)
        if settings.nli_backend == "lexical":
            logger.warning(
                "NLI backend: lexical. Answers are compared by their normalised words, without a model; "
                "give --nli-model for clusters by meaning"
            )
        logger.info("starting %d worker(s) on %s for %s", num_workers, settings.device, json.dumps(settings.model))
        pool = WorkerPool(settings, num_workers, gpus_per_worker)
        pool.start()
        app, metrics = create_app(pool, args.max_items, args.max_item_tokens)
        guard = Guard(
            app, metrics, int(args.max_body_mb * 2**20), args.max_concurrency, os.environ.get("SIOP_API_TOKEN") or None
        )
        config = uvicorn.Config(
            guard,
            http=TimedHttpProtocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
        )
        logger.info("listening on http://%s:%d", args.host, sock.getsockname()[1])
        return asyncio.run(_serve(pool, _Server(config), sock))
    except SiopError as error:
        logger.error("the scorer cannot start: %s", error)
        return 1
    finally:
        if pool is not None:
            pool.close()


if __name__ == "__main__":
    sys.exit(main())
