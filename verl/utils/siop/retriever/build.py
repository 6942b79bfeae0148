"""Builds the index of a corpus, apart from serving it.

    python -m verl.utils.siop.retriever.build bm25 --corpus wiki-18.jsonl
    python -m verl.utils.siop.retriever.build encode --corpus wiki-18.jsonl --model intfloat/e5-base-v2
    python -m verl.utils.siop.retriever.build COMMAND --help

Every command says what it will take before it starts, and goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from verl.utils.siop.errors import SiopError
from verl.utils.siop.retriever import bm25_build, dense_build, qdrant_build


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status is not zero if there is no index at its end."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.siop.retriever.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (bm25_build, dense_build, qdrant_build):
        module.add_commands(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (SiopError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from here\n")
        return 130
    return 0


if __name__ == "__main__":
    # force: importing verl has configured the root logger, at WARNING.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True)
    sys.exit(main())
