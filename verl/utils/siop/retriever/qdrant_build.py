"""Uploads the vectors of an exact index into Qdrant."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.utils.siop.retriever.dense import OFFSETS_FILE, PROBES_FILE, encoder_of, flat_shards, read_flat
from verl.utils.siop.retriever.folder import (
    Manifest,
    check_folder,
    check_target,
    identify_files,
    new_folder,
    write_manifest,
)
from verl.utils.siop.retriever.parts import locked_parts
from verl.utils.siop.retriever.qdrant import QDRANT, QdrantVectors, connect, upload

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

logger = logging.getLogger(__name__)


def add_commands(subparsers: Any) -> None:
    """Adds ``qdrant``."""
    what = "upload the vectors of an exact index into Qdrant, and make the index that searches there"
    parser = subparsers.add_parser("qdrant", help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("source", type=Path, metavar="DIR", help="folder that encode or import has made")
    add("--url", required=True, help="of the database, as http://10.0.0.5:6333; its key comes from QDRANT_API_KEY")
    add("--collection", required=True, help="its name there; an upload that was interrupted goes on")
    add("--index", type=Path, help="new folder (default: DIR with .qdrant appended)")


def _run(args: argparse.Namespace) -> None:
    target = args.index or args.source.with_name(f"{args.source.name}.{QDRANT}")
    build_qdrant(args.source, target, connect(args.url), args.url, args.collection)
    logger.info("%s searches in the collection %s at %s", target, args.collection, args.url)


def build_qdrant(
    source: Path, target: Path, client: QdrantClient, url: str, collection: str, *, show_progress: bool = True
) -> Manifest:
    """Uploads the vectors of the flat index in ``source``; ``target`` becomes the folder of an index over them.

    Raises:
        CorpusError: ``source`` is no flat index or is damaged, or ``target`` holds something else.
        QdrantUnavailable, SiopError: as :func:`upload`.
    """
    flat = read_flat(source)
    check_target(target, QDRANT)
    corpus = check_folder(source, flat, show_progress=show_progress)
    documents, dimension = flat.corpus.documents, encoder_of(source, flat).dimension
    shards = {name: file.sha256 for name, file in sorted(flat.files.items()) if name.endswith(".f16.npy")}
    sha256 = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    started = time.monotonic()
    upload(client, collection, flat_shards(source, flat, dimension), sha256, show_progress=show_progress)
    QdrantVectors(client, collection).check(documents, dimension, sha256)
    with locked_parts(target) as (parts, _), new_folder(target, parts, QDRANT) as folder:
        for name in (OFFSETS_FILE, PROBES_FILE):
            shutil.copyfile(source / name, folder / name)
        manifest = Manifest(
            kind=QDRANT,
            corpus=flat.corpus.model_copy(update={"path": str(corpus.resolve())}),
            libraries=flat.libraries,
            settings={**flat.settings, "url": url, "collection": collection, "vectors_sha256": sha256},
            self_test=flat.self_test,
            measured={"upload_seconds": round(time.monotonic() - started, 1)},
            files=identify_files(folder, [folder / OFFSETS_FILE, folder / PROBES_FILE]),
        )
        write_manifest(folder, manifest)
    return manifest
