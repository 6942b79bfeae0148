"""A page over the rollouts of one training or several: which turns were paid, and why.

    python -m verl.utils.siop.inspector runs/NAME                      serve it, at http://127.0.0.1:8400
    python -m verl.utils.siop.inspector runs/ONE runs/OTHER            side by side
    python -m verl.utils.siop.inspector runs/NAME --export out.html    one file that opens without a network
    python -m verl.utils.siop.inspector runs/NAME --recompute ablation=release

It follows a training that goes on. Environment: SIOP_API_TOKEN, if set, is the bearer token of every request; the
address that is printed has it for the browser.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from tqdm import tqdm
from verl.utils.siop.errors import SiopError
from verl.utils.siop.http.server import bind, uvicorn_config
from verl.utils.siop.inspector.app import LOCAL_NAMES, create_app
from verl.utils.siop.inspector.export import EXPORT_MB, export
from verl.utils.siop.inspector.recompute import read_recipe
from verl.utils.siop.inspector.runs import Runs

logger = logging.getLogger("siop.inspector")

PORT = 8400
REFRESH_S = 1.0
GRACE_S = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.siop.inspector",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training, or its folder rollouts")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=PORT, help="port to listen on, 0 for any (default: %(default)s)")
    what = "show the credit under other siop_* keys beside the training's; ablation=NAME for a file of config/ablation"
    add("--recompute", nargs="+", default=[], metavar="KEY=VALUE", help=what)
    add("--export", type=Path, metavar="FILE", help="write one HTML file in place of serving")
    what = "largest file of --export (default: %(default)g)"
    add("--export-mb", type=float, default=EXPORT_MB, metavar="MB", help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.export is None and args.export_mb != EXPORT_MB:
        parser.error(f"--export-mb {args.export_mb:g} has no effect without --export")
    if args.export_mb <= 0:
        parser.error(f"--export-mb is {args.export_mb:g}, it must be more than 0")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port is {args.port}, it must be from 0 to 65535")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True)
    try:
        recipe = read_recipe(args.recompute, Path("config/ablation")) if args.recompute else None
        runs = Runs(args.runs, recipe)
        if args.export:
            with _Bar() as bar:
                runs.refresh(bar)
            logger.info("%s", export(runs, args.export, args.export_mb))
            return 0
        return _serve(runs, args.host, args.port)
    except (SiopError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _serve(runs: Runs, host: str, port: int) -> int:
    listener = bind(host, port, listen=True)
    token = os.environ.get("SIOP_API_TOKEN") or None
    local = listener.getsockname()[0] in ("127.0.0.1", "::1")
    if not local and token is None:
        logger.warning("whoever reaches %s can read the rollouts: set SIOP_API_TOKEN", host)
    app = create_app(runs, token, LOCAL_NAMES if local else ("*",))
    address = f"http://{'[::1]' if ':' in host else host}:{listener.getsockname()[1]}/"
    sys.stdout.write(f"{address}{f'?token={token}' if token else ''}\n")
    sys.stdout.flush()
    follower = threading.Thread(target=runs.follow, args=(REFRESH_S,), name="follow", daemon=True)
    follower.start()
    server = uvicorn.Server(uvicorn_config(app, GRACE_S))
    try:
        server.run(sockets=[listener])
    finally:
        runs.close()
    return 0


class _Bar:
    """Progress of reading the dumps, on a terminal."""

    def __init__(self) -> None:
        self._bar = tqdm(unit="step", disable=None, leave=False)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, name: str, done: int, total: int) -> None:
        self._bar.set_description(f"reading {name}", refresh=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
