"""Retriever service with Search-R1's wire format.

    python -m verl.utils.siop.retriever.server --corpus corpus.jsonl

    POST /retrieve {"queries": ["who founded ..."], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id": "...", "contents": "..."}, "score": 7.1}]]}
    GET /health -> {"status": "healthy", "documents": 3160}

With "return_scores" false (the default) a hit is the document alone. A query gets fewer than "topk" hits when fewer
documents share a word with it. Bad input gets 422 with the name of the field, a body over --max-body-mb 413, one that
does not arrive in time 408. Requests over --max-concurrency wait for their turn; if a thousand do, more get 503.

The corpus has one JSON object per line with "id" and "contents". The index is built once and kept in a folder next to
the corpus; it is built again when the corpus has changed.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from verl.utils.siop.errors import SiopError
from verl.utils.siop.http.json_body import answer_invalid
from verl.utils.siop.http.limits import Limits
from verl.utils.siop.http.server import bind, uvicorn_config
from verl.utils.siop.retriever.bm25 import Bm25Index, Index

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
    max_body_mb: float = MAX_BODY_MB,
    max_concurrency: int = MAX_CONCURRENCY,
    max_waiting: int = MAX_WAITING,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> FastAPI:
    """The service over any ``Index``.

    Args:
        index: answers the searches.
        topk: hits per query when a request does not say.
        max_body_mb, max_concurrency, max_waiting, body_timeout_s: see :class:`Limits`.
    """
    app = FastAPI(title="SIOP retriever")
    app.add_middleware(
        Limits,
        max_body_bytes=int(max_body_mb * 2**20),
        max_concurrency=max_concurrency,
        max_waiting=max_waiting,
        body_timeout_s=body_timeout_s,
    )
    app.exception_handler(RequestValidationError)(answer_invalid)

    # Async: no thread of the searches' pool is needed for it.
    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "healthy", "documents": len(index)}

    # Not async: FastAPI runs it in its thread pool, so that a long search does not hold up /health.
    @app.post("/retrieve")
    def retrieve(request: RetrieveRequest) -> dict[str, Any]:
        hits = index.search(request.queries, request.topk or topk)
        if request.return_scores:
            return {"result": [[{"document": d, "score": score} for d, score in found] for found in hits]}
        return {"result": [[d for d, _ in found] for found in hits]}

    return app


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
    add("--corpus", type=Path, required=True, help="JSONL file, one passage per line")
    add("--index", type=Path, help="folder of the index (default: CORPUS with .bm25 appended)")
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
    args = parser.parse_args(argv)
    index_dir = args.index or args.corpus.with_name(args.corpus.name + ".bm25")
    try:
        listener = bind(args.host, args.port, listen=False)
        index = Bm25Index.open(args.corpus, index_dir)
    except (SiopError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    host, port = listener.getsockname()[:2]
    logger.info("serving %d documents of %s at http://%s:%d/retrieve", len(index), args.corpus, host, port)
    app = create_app(index, topk=args.topk, max_body_mb=args.max_body_mb, max_concurrency=args.max_concurrency)
    server = uvicorn.Server(uvicorn_config(app, GRACE_S))
    server.run(sockets=[listener])
    return 0 if server.started else 1


if __name__ == "__main__":
    # force: importing verl has configured the root logger, at WARNING.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True)
    sys.exit(main())
