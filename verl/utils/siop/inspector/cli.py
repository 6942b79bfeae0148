"""A page over the rollouts of one training or several: which turns were paid, and why.

    python -m siop_inspector runs/NAME                       serve it, at http://127.0.0.1:8400
    python -m siop_inspector runs/ONE runs/OTHER             side by side
    python -m siop_inspector runs/NAME --export out.html     one file that opens without a network
    python -m siop_inspector runs/NAME --recompute ablation=release

python -m verl.utils.siop.inspector is the same, after the seconds of importing verl.

It follows a training that goes on; Ctrl-C ends it. Environment: SIOP_API_TOKEN, if set, is the bearer token of every
request; the address that is printed has it for the browser.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import uvicorn
from tqdm import tqdm
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.http.server import bind, is_exposed, uvicorn_config
from verl.utils.siop.inspector.app import LOCAL_NAMES, create_app
from verl.utils.siop.inspector.export import EXPORT_MB, export
from verl.utils.siop.inspector.recompute import read_recipe
from verl.utils.siop.inspector.runs import Runs

logger = logging.getLogger("siop.inspector")

HOST, PORT = "127.0.0.1", 8400
# Listened on, they are all addresses of the machine; a browser on it takes the other one.
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# Of the presets: where the command is run, else in the checkout that this file is of.
ABLATIONS = Path("config/ablation")
REFRESH_S = 1.0
GRACE_S = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m siop_inspector",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training, or its folder rollouts")
    add("--host", help=f"address to listen on (default: {HOST}); any but this machine's own needs SIOP_API_TOKEN")
    add("--port", type=int, help=f"port to listen on, 0 for any (default: {PORT})")
    what = "show the credit under other siop_* keys beside the training's; ablation=NAME for a file of config/ablation"
    add("--recompute", nargs="+", default=[], metavar="KEY=VALUE", help=what)
    add("--export", type=Path, metavar="FILE", help="write one HTML file in place of serving")
    what = f"largest file of --export (default: {EXPORT_MB:g})"
    add("--export-mb", type=float, metavar="MB", help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True)
    try:
        recipe = read_recipe(args.recompute, _ablations()) if args.recompute else None
        runs = Runs(args.runs, recipe)
        if args.export:
            with _Bar() as bar:
                runs.refresh(bar)
                said = export(runs, args.export, args.export_mb or EXPORT_MB, bar)
            logger.info("%s", said)
            return 0
        return _serve(runs, args.host or HOST, PORT if args.port is None else args.port)
    except (SiopError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a line that names what is wrong with the options."""
    if args.export is None:
        if args.export_mb is not None:
            parser.error(f"--export-mb {args.export_mb:g} has no effect without --export")
    else:
        for name in ("host", "port"):
            if getattr(args, name) is not None:
                parser.error(f"--{name} {getattr(args, name)} has no effect with --export, which serves nothing")
        if args.export.is_dir() or not args.export.absolute().parent.is_dir():
            parser.error(f"--export is {args.export}, it must be a file in a folder that exists")
    if args.export_mb is not None and not 0 < args.export_mb < math.inf:
        parser.error(f"--export-mb is {args.export_mb:g}, it must be a number above 0")
    if args.port is not None and not 0 <= args.port <= 65535:
        parser.error(f"--port is {args.port}, it must be from 0 to 65535")


def _ablations() -> Path:
    checkout = Path(__file__).resolve().parents[4] / ABLATIONS
    return checkout if checkout.is_dir() and not ABLATIONS.is_dir() else ABLATIONS


def _serve(runs: Runs, host: str, port: int) -> int:
    listener = bind(host, port, listen=True)
    token = os.environ.get("SIOP_API_TOKEN") or None
    exposed = is_exposed(listener)
    if exposed and token is None:
        listener.close()
        raise SiopConfigError(f"--host {host} shows the rollouts to whoever reaches it: set SIOP_API_TOKEN")
    place, port = listener.getsockname()[:2]
    app = create_app(runs, token, ("*",) if exposed else (*LOCAL_NAMES, place))
    place = ANY.get(place, place)
    query = f"?token={quote(token, safe='')}" if token else ""
    sys.stdout.write(f"http://{f'[{place}]' if ':' in place else place}:{port}/{query}\n")
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
    """Progress of reading the dumps and of writing an export, on a terminal."""

    def __init__(self) -> None:
        self._bar = tqdm(unit="step", disable=None, leave=False)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, name: str, done: int, total: int) -> None:
        self._bar.set_description(name, refresh=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
