"""Serving until a signal, or until the models cannot be loaded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from verl.utils.siop.http.server import uvicorn_config
from verl.utils.siop.scorer.pool import WorkerPool

logger = logging.getLogger("siop.scorer")

GRACE_S = 30  # what is in flight at shutdown may take this long


class _Server(uvicorn.Server):
    # uvicorn raises the signal again after a graceful stop, which would end the process before Ray is stopped.
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


async def serve(pool: WorkerPool, app: ASGIApp, sock: socket.socket) -> None:
    """Serve until a signal; the models are loaded meanwhile.

    Raises:
        SiopError: they cannot be loaded.
    """
    server = _Server(uvicorn_config(app, GRACE_S))

    def stop() -> None:
        if server.should_exit:
            server.force_exit = True
        else:
            logger.info("stopping: requests in flight have %d s to finish", GRACE_S)
            server.should_exit = True

    async def load_and_watch() -> None:
        started = time.monotonic()
        try:
            await pool.load()
            assert pool.info is not None
            logger.info(
                "ready after %.1f s: %d worker(s), model %s, NLI %s",
                time.monotonic() - started,
                pool.num_workers,
                pool.info.engine.model,
                pool.info.nli,
            )
            await pool.watch()
        finally:
            server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    working = asyncio.create_task(load_and_watch())
    try:
        await server.serve([sock])
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
