"""Retriever service with Search-R1's wire format.

    python -m verl.utils.siop.retriever.server --corpus corpus.jsonl       BM25
    python -m verl.utils.siop.retriever.server --index corpus.jsonl.flat   what retriever.build has made

    POST /retrieve {"queries": ["who founded ..."], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id": "...", "contents": "..."}, "score": 7.1}]]}
    GET /health -> {"status": "healthy", "documents": 3160, "topk": 3, "kind": "flat", ...}
    GET /metrics -> Prometheus' text format

With "return_scores" false (the default) a hit is the document alone. A query gets fewer than "topk" hits when BM25 has
fewer documents that share a word with it, or the corpus has fewer. Bad input gets 422 with the name of the field, a
body over --max-body-mb 413, one that does not arrive in time 408. Requests over --max-concurrency wait for their turn;
if a thousand do, more get 503. A search that fails gets 500 with the cause.

The corpus has one JSON object per line with "id" and "contents". With --corpus alone its BM25 index is built once and
kept in a folder next to it; it is built again when the corpus has changed. The manifest of --index says of which kind
an index is. At start a dense one is checked: every byte, the encoder, and that passages are found by their own text.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from verl.utils.siop.errors import ServiceUnavailable, SiopConfigError, SiopError
from verl.utils.siop.http.json_body import answer_invalid
from verl.utils.siop.http.limits import Limits
from verl.utils.siop.http.server import bind, is_exposed, uvicorn_config
from verl.utils.siop.retriever import dense
from verl.utils.siop.retriever.batching import CACHE_MB, BatchedIndex
from verl.utils.siop.retriever.bm25 import Bm25Index
from verl.utils.siop.retriever.documents import Documents
from verl.utils.siop.retriever.folder import IndexFolderError, Manifest, read_manifest
from verl.utils.siop.retriever.index import Index
from verl.utils.siop.retriever.metrics import Metrics
from verl.utils.siop.retriever.reading import reading
from verl.utils.siop.retriever.sharded import INDEX_HEADER, ShardedIndex, index_id

logger = logging.getLogger("siop.retriever")

MAX_QUERIES, MAX_QUERY_CHARS, MAX_TOPK = 512, 4096, 100
MAX_BODY_MB = 16.0  # twice the longest that the other limits allow in UTF-8
MAX_CONCURRENCY = 32  # fewer than FastAPI's 40 threads
MAX_WAITING = 1024
BODY_TIMEOUT_S = 30.0
GRACE_S = 10  # what is in flight at shutdown may take this long


class RetrieveRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    queries: list[Annotated[StrictStr, Field(max_length=MAX_QUERY_CHARS)]] = Field(min_length=1, max_length=MAX_QUERIES)
    topk: StrictInt | None = Field(default=None, ge=1, le=MAX_TOPK)
    return_scores: StrictBool = False


def create_app(
    index: Index,
    *,
    topk: int = 3,
    facts: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    metrics: Metrics | None = None,
    max_body_mb: float = MAX_BODY_MB,
    max_concurrency: int = MAX_CONCURRENCY,
    max_waiting: int = MAX_WAITING,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> FastAPI:
    """The service over any ``Index``.

    Args:
        index: answers the searches.
        topk: hits per query when a request does not say.
        facts: what else /health tells, see :func:`facts_of`; called for each answer where it has to be found out.
        metrics: what /metrics tells.
        max_body_mb, max_concurrency, max_waiting, body_timeout_s: see :class:`Limits`.
    """
    app, counted = FastAPI(title="SIOP retriever"), metrics or Metrics()
    app.add_middleware(
        Limits,
        max_body_bytes=int(max_body_mb * 2**20),
        max_concurrency=max_concurrency,
        max_waiting=max_waiting,
        body_timeout_s=body_timeout_s,
    )
    app.add_middleware(_Counted, metrics=counted)
    app.exception_handler(RequestValidationError)(answer_invalid)
    app.exception_handler(SiopError)(_answer_failed)

    stated = dict(facts() if callable(facts) else facts or {})
    identity = index_id({"documents": len(index), **stated})

    # Async: no thread of the searches' pool is needed for it.
    @app.get("/health")
    async def health() -> dict[str, Any]:
        found = await asyncio.to_thread(facts) if callable(facts) else stated
        return {"status": "healthy", "documents": len(index), "topk": topk, **found}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(counted.registry), media_type=CONTENT_TYPE_LATEST)

    # Not async: FastAPI runs it in its thread pool, so that a long search does not hold up /health.
    @app.post("/retrieve")
    def retrieve(request: RetrieveRequest, response: Response) -> dict[str, Any]:
        response.headers[INDEX_HEADER] = identity
        hits = index.search(request.queries, request.topk or topk)
        if request.return_scores:
            return {"result": [[{"document": d, "score": score} for d, score in found] for found in hits]}
        return {"result": [[d for d, _ in found] for found in hits]}

    return app


async def _answer_failed(_: Request, error: SiopError) -> Response:
    logger.error("a request failed: %s", error)
    return JSONResponse({"detail": str(error)}, 503 if isinstance(error, ServiceUnavailable) else 500)


class _Counted:
    """ASGI middleware: counts searches by status, those that were refused too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/retrieve":
            await self._app(scope, receive, send)
            return
        status, started = "500", time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.requests.labels(status).inc()
            self._metrics.request_seconds.observe(time.perf_counter() - started)


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """What /health tells of an index: kind, digest of the corpus; of a dense one also encoder and measured recall."""
    facts: dict[str, Any] = {"kind": manifest.kind, "corpus_sha256": manifest.corpus.sha256}
    if "encoder" in manifest.settings:
        facts["encoder"] = manifest.settings["encoder"]
        facts["recall"] = "exact" if manifest.kind == dense.FLAT else manifest.measured.get("recall")
    return facts


def open_index(
    args: argparse.Namespace, metrics: Metrics
) -> tuple[Index, Mapping[str, Any] | Callable[[], Mapping[str, Any]]]:
    """The index of the command line, and its facts.

    Raises:
        SiopError: there is none, it is not whole, or an option has no effect on its kind.
    """
    if args.shards:
        sharded = ShardedIndex(args.shards)
        return sharded, sharded.facts
    folder: Path = args.index or args.corpus.with_name(args.corpus.name + ".bm25")
    try:
        manifest = read_manifest(folder)
    except IndexFolderError:
        # Of a corpus alone it can only be BM25, which is built where it is missing or damaged.
        if args.corpus is None or args.model or args.devices:
            raise
        manifest = None
    if manifest is not None and manifest.kind != "bm25":
        devices = args.devices.split(",") if args.devices else None
        indexes = dense.load(folder, corpus=args.corpus, model=args.model, devices=devices, metrics=metrics)
        return BatchedIndex(indexes, cache_mb=args.cache_mb, metrics=metrics), facts_of(manifest)
    for option in ("model", "devices"):
        if getattr(args, option):
            raise SiopConfigError(f"--{option} {getattr(args, option)} has no effect: {folder} is an index of BM25")
    index = Bm25Index.open(args.corpus, folder) if args.corpus else Bm25Index.load(folder, show_progress=True)
    return index, facts_of(read_manifest(folder))


def _number(name: str, what: str, low: float, high: float, kind: type = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{name} is a number {what}, got {text!r}")
        return value

    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is stopped; the exit status is not zero if it could not start."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.siop.retriever.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--corpus", type=Path, help="JSONL file, one passage per line (default: where it was when --index was built)")
    add("--index", type=Path, help="folder of the index (default: CORPUS with .bm25 appended)")
    what = "retrievers that hold the parts of one dense index, in place of --index: as http://10.0.0.1:8000"
    add("--shards", nargs="+", metavar="URL", help=what)
    add("--read", action="store_true", help="answer /read too: documents of --corpus by title or id")
    add("--model", help="of a dense index: where its encoder is, if it has moved; folder, or name on the hub")
    add("--devices", help="of a dense index: as cuda:0,cuda:1 (default: all visible GPUs, or cpu)")
    port, default = _number("a port", "from 0 to 65535", 0, 65535), "(default: %(default)s)"
    add("--port", type=port, default=8000, help=f"port, 0 for any free one {default}")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    topk = _number("topk", f"from 1 to {MAX_TOPK}", 1, MAX_TOPK)
    add("--topk", type=topk, default=3, help=f"hits per query when a request does not say {default}")
    # The least above 0 and the most below infinity.
    body_mb = _number("max-body-mb", "above 0", math.ulp(0.0), sys.float_info.max, float)
    what = "largest request body; more get 413 (default: %(default)g)"
    add("--max-body-mb", type=body_mb, default=MAX_BODY_MB, help=what)
    what = f"requests at once; {MAX_WAITING} more wait, beyond them 503 with Retry-After {default}"
    concurrency = _number("max-concurrency", "from 1", 1, math.inf)
    add("--max-concurrency", type=concurrency, default=MAX_CONCURRENCY, help=what)
    what = "of a dense index: memory for the hits of earlier queries, 0 for none (default: %(default)g)"
    cache_mb = _number("cache-mb", "from 0", 0, sys.float_info.max, float)
    add("--cache-mb", type=cache_mb, default=CACHE_MB, help=what)
    args = parser.parse_args(argv)
    if args.corpus is None and args.index is None and args.shards is None:
        parser.error("there is nothing to search: give --index, --shards, or --corpus for BM25")
    if args.shards and (args.index or args.model or args.devices):
        parser.error("--index, --model and --devices have no effect with --shards: they are those of the parts")
    if args.corpus and args.shards and not args.read:
        parser.error("--corpus has no effect with --shards, unless with --read")
    if args.read and args.corpus is None:
        parser.error("--read needs --corpus")
    metrics = Metrics()
    try:
        listener = bind(args.host, args.port, listen=False)
        index, facts = open_index(args, metrics)
        documents = None
        if args.read:
            documents = Documents.open(args.corpus, args.corpus.with_name(f"{args.corpus.name}.documents"))
    except (SiopError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    host, port = listener.getsockname()[:2]
    where = " ".join(args.shards or [str(args.index or args.corpus)])
    logger.info("serving %d documents of %s at http://%s:%d/retrieve", len(index), where, host, port)
    if is_exposed(listener):
        logger.warning("whoever reaches %s can search: Search-R1's wire format has no token", args.host)
    limits = {"max_body_mb": args.max_body_mb, "max_concurrency": args.max_concurrency}
    app = create_app(index, topk=args.topk, facts=facts, metrics=metrics, **limits)
    if documents is not None:
        app.include_router(reading(documents))
    server = uvicorn.Server(uvicorn_config(app, GRACE_S))
    server.run(sockets=[listener])
    return 0 if server.started else 1


if __name__ == "__main__":
    # force: importing verl has configured the root logger, at WARNING.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True)
    sys.exit(main())
