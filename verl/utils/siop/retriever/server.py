"""Retriever service with Search-R1's wire format.

    python -m verl.utils.siop.retriever.server --corpus corpus.jsonl

    POST /retrieve {"queries": ["who founded ..."], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"id": "...", "contents": "..."}, "score": 7.1}]]}
    GET /health -> {"status": "healthy", "documents": 3160}

With "return_scores" false (the default) a hit is the document alone. A query gets fewer than "topk" hits when fewer
documents share a word with it. Bad input gets 422 with the name of the field.

The corpus has one JSON object per line with "id" and "contents". The index is built once and kept in a folder next to
the corpus; it is built again when the corpus has changed.
"""

# No `from __future__ import annotations`: FastAPI could not resolve the request class defined in `create_app`.
import argparse
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from verl.utils.siop.errors import SiopError
from verl.utils.siop.retriever.bm25 import Bm25Index, Index

logger = logging.getLogger("siop.retriever")

MAX_TOPK = 100


def create_app(
    index: Index, *, topk: int = 3, max_queries: int = 512, max_topk: int = MAX_TOPK, max_query_chars: int = 4096
) -> FastAPI:
    """The service over any ``Index``.

    Args:
        index: answers the searches.
        topk: hits per query when a request does not say.
        max_queries, max_topk, max_query_chars: limits of a request; beyond them it gets 422.
    """

    class RetrieveRequest(BaseModel):
        model_config = ConfigDict(extra="forbid")

        queries: list[Annotated[StrictStr, Field(max_length=max_query_chars)]] = Field(
            min_length=1, max_length=max_queries
        )
        topk: StrictInt | None = Field(default=None, ge=1, le=max_topk)
        return_scores: StrictBool = False

    app = FastAPI(title="SIOP retriever")

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "healthy", "documents": len(index)}

    # Not async: FastAPI runs it in its thread pool, so that a long search does not hold up /health.
    @app.post("/retrieve")
    def retrieve(request: RetrieveRequest) -> dict[str, Any]:
        hits = index.search(request.queries, request.topk or topk)
        if request.return_scores:
            return {"result": [[{"document": d, "score": score} for d, score in found] for found in hits]}
        return {"result": [[d for d, _ in found] for found in hits]}

    return app


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, got {text!r}")
    return int(text)


def _topk(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_TOPK:
        raise argparse.ArgumentTypeError(f"topk is a number from 1 to {MAX_TOPK}, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is stopped; the exit status is not zero if it could not start."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.siop.retriever.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", type=Path, required=True, help="JSONL file, one passage per line")
    parser.add_argument("--index", type=Path, help="folder of the index (default: CORPUS with .bm25 appended)")
    parser.add_argument("--port", type=_port, default=8000, help="port, 0 for any free one (default: 8000)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--topk", type=_topk, default=3, help="hits per query when a request does not say (default: 3)")
    args = parser.parse_args(argv)
    index_dir = args.index or args.corpus.with_name(args.corpus.name + ".bm25")
    try:
        listener = _bind(args.host, args.port)
        index = Bm25Index.open(args.corpus, index_dir)
    except (SiopError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    host, port = listener.getsockname()[:2]
    logger.info("serving %d documents of %s at http://%s:%d/retrieve", len(index), args.corpus, host, port)
    config = uvicorn.Config(create_app(index, topk=args.topk), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _bind(host: str, port: int) -> socket.socket:
    """Takes the port before the index is built, so that a busy one is known at once. It does not listen yet.

    Raises:
        SiopError: the port is in use, or the address is not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise SiopError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


if __name__ == "__main__":
    # force: importing verl has configured the root logger, at WARNING.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True)
    sys.exit(main())
