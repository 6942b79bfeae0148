"""Scoring service: the entry point.

    python -m verl.utils.siop.scoring_server --model PATH [--nli-model PATH] [--port 8390]

The service itself is :mod:`verl.utils.siop.scorer`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence

from verl.utils.siop.errors import SiopError
from verl.utils.siop.http.server import bind, is_exposed
from verl.utils.siop.processes import adopt_orphans, end_started
from verl.utils.siop.scorer.app import create_app
from verl.utils.siop.scorer.guard import Guard
from verl.utils.siop.scorer.pool import WorkerPool
from verl.utils.siop.scorer.serve import serve
from verl.utils.siop.scorer.settings import parser, worker_settings
from verl.utils.siop.scorer.workers import LOG_FORMAT

logger = logging.getLogger("siop.scorer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until SIGTERM or Ctrl-C; returns the exit code, 1 for anything that keeps it from starting."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr, force=True)
    for noisy in ("httpx", "ray"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    pool: WorkerPool | None = None
    try:
        settings, num_workers, gpus_per_worker = worker_settings(args)
        sock = bind(args.host, args.port, listen=True)
        token = os.environ.get("SIOP_API_TOKEN") or None
        if is_exposed(sock) and token is None:
            # No error: on several nodes it is asked over their inner network.
            logger.warning("whoever reaches %s can use the scorer: set SIOP_API_TOKEN, for the trainer too", args.host)
        if settings.nli_backend == "lexical":
            logger.warning(
                "NLI backend: lexical. It compares words: answers that say the same in other words are different "
                "clusters, and a passage is evidence for an answer if it holds its words, whatever it says about them; "
                "give --nli-model for both by meaning"
            )
        logger.info("starting %d worker(s) on %s for %s", num_workers, settings.device, json.dumps(settings.model))
        pool = WorkerPool(settings, num_workers, gpus_per_worker)
        pool.start()
        app, metrics = create_app(pool, args.max_items, args.max_item_tokens)
        guard = Guard(app, metrics, int(args.max_body_mb * 2**20), args.max_concurrency, token)
        logger.info("listening on http://%s:%d", args.host, sock.getsockname()[1])
        asyncio.run(serve(pool, guard, sock))
        return 0
    except SiopError as error:
        logger.error("the scorer cannot start: %s", error)
        return 1
    finally:
        if pool is not None:
            pool.close()


def _alone() -> int:
    """:func:`main` in a process of its own, which leaves none behind."""
    adopt_orphans()
    try:
        return main()
    finally:
        end_started()


if __name__ == "__main__":
    sys.exit(_alone())
