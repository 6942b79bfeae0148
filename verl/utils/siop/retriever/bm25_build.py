"""The command that builds an index of BM25."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from verl.utils.siop.retriever.bm25 import Bm25Index


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add ``bm25``."""
    parser = commands.add_parser(
        "bm25",
        help="an index of the words of a corpus",
        description="Builds the index of BM25 of a corpus, or says that it is up to date. Interrupted, the same command"
        " goes on after the last finished block; a block is dropped if the corpus has changed before its end.",
    )
    parser.add_argument("--corpus", type=Path, required=True, help="JSONL file, one passage per line")
    parser.add_argument("--index", type=Path, help="folder of the index (default: CORPUS with .bm25 appended)")
    parser.add_argument("--rebuild", action="store_true", help="even if it is up to date, and from the first block")
    parser.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> None:
    folder = args.index or args.corpus.with_name(args.corpus.name + ".bm25")
    if args.rebuild:
        Bm25Index.build(args.corpus, folder, go_on=False)
    else:
        Bm25Index.open(args.corpus, folder)
