"""Commands that build and check a dense index."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl.utils.siop.retriever import dense
from verl.utils.siop.retriever.ann import KINDS
from verl.utils.siop.retriever.ann_build import build_ann
from verl.utils.siop.retriever.corpus import CorpusError
from verl.utils.siop.retriever.encoder import DEFAULT_MODEL, DTYPES, MAX_TOKENS, Encoder, visible_devices
from verl.utils.siop.retriever.encoding import encode, encode_on_ray, joined_ray
from verl.utils.siop.retriever.faiss_import import FaissFlatFile, import_vectors
from verl.utils.siop.retriever.folder import check_folder, read_manifest
from verl.utils.siop.retriever.parts import locked_parts
from verl.utils.siop.retriever.vector_job import VectorJob
from verl.utils.siop.retriever.vectors import SHARD_ROWS

logger = logging.getLogger(__name__)

_GPU_BATCH, _CPU_BATCH = 256, 32


def add_commands(subparsers: Any) -> None:
    """Adds ``encode``, ``import``, ``index`` and ``verify``."""
    add = _adder(subparsers, "encode", _encode, "encode a corpus: an exact index, kind flat")
    _corpus_options(add)
    _encoder_options(add)
    add("--devices", help="as cuda:0,cuda:1, a process for each (default: all GPUs, or cpu)")
    add("--batch-size", type=int, help=f"passages at once (default: {_GPU_BATCH} on a GPU, {_CPU_BATCH} on a CPU)")
    what = "encode as tasks of the Ray cluster at ADDRESS (default: RAY_ADDRESS, or a Ray started here)"
    add("--ray", nargs="?", const="", metavar="ADDRESS", help=what)

    add = _adder(subparsers, "import", _import, "take the vectors of a faiss IndexFlatIP, as Search-R1's e5_Flat.index")
    add("--faiss", type=Path, required=True, help="file of the vectors, one for each line of the corpus")
    _corpus_options(add)
    _encoder_options(add)
    add("--device", help="device of the encoder that checks them (default: the first GPU, or cpu)")

    add = _adder(subparsers, "index", _index, "build an approximate index from an exact one")
    add("source", type=Path, metavar="DIR", help="folder that encode or import has made")
    add("--kind", choices=KINDS, required=True, help="see docs/retrieval.md")
    add("--index", type=Path, help="new folder (default: DIR with .KIND appended)")
    add("--queries", type=Path, help="text file with a query a line, to measure recall (default: spans of passages)")
    add("--recall", type=float, default=0.95, help="recall at 10 to reach with the least effort (default: %(default)s)")
    _moved_options(add)

    add = _adder(subparsers, "verify", _verify, "check an index: every byte, its encoder, its passages")
    add("index", type=Path, metavar="DIR", help="folder of the index")
    _moved_options(add)


def _adder(subparsers: Any, name: str, run: Any, what: str) -> Any:
    parser = subparsers.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(run=run)
    return parser.add_argument


def _corpus_options(add: Any) -> None:
    add("--corpus", type=Path, required=True, help="JSONL file, one passage per line")
    add("--index", type=Path, help="folder of the index (default: CORPUS with .flat appended)")
    add(
        "--shard-rows",
        type=int,
        default=SHARD_ROWS,
        help="vectors of a file: all that a stop can lose (default: %(default)s)",
    )


def _encoder_options(add: Any) -> None:
    add("--model", default=DEFAULT_MODEL, help="folder, or name on the Hugging Face hub (default: %(default)s)")
    add("--revision", help="commit on the hub")
    own = "(default: the model's own; those of E5 for E5)"
    add("--query-prefix", help=f"text in front of each query {own}")
    add("--passage-prefix", help=f"text in front of each passage {own}")
    add("--max-query-tokens", type=int, default=MAX_TOKENS, help="longer queries are cut (default: %(default)s)")
    add("--max-passage-tokens", type=int, default=MAX_TOKENS, help="longer passages are cut (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="of the encoder (default: float16 on a GPU, float32 on a CPU)")


def _moved_options(add: Any) -> None:
    add("--corpus", type=Path, help="where the corpus is, if it has moved")
    add("--model", help="where the encoder is, if it has moved")
    add("--device", help="device of the encoder (default: the first GPU, or cpu)")


def _device(args: argparse.Namespace) -> str:
    return visible_devices([args.device] if args.device else None)[0]


def _load(args: argparse.Namespace, device: str, dtype: str | None) -> Encoder:
    return Encoder.load(
        args.model,
        revision=args.revision,
        query_prompt=args.query_prefix,
        passage_prompt=args.passage_prefix,
        max_query_tokens=args.max_query_tokens,
        max_passage_tokens=args.max_passage_tokens,
        dtype=dtype,
        device=device,
    )


@contextmanager
def _job(args: argparse.Namespace, encoder: Encoder, source: str) -> Iterator[VectorJob | None]:
    """What is to be made, held against other processes; None if it is there."""
    folder = args.index or args.corpus.with_name(args.corpus.name + ".flat")
    with locked_parts(folder):
        job = VectorJob.open(folder, args.corpus, encoder.identity, source=source, shard_rows=args.shard_rows)
        if job is None:
            logger.info("%s is whole already", folder)
        yield job


def _encode(args: argparse.Namespace) -> None:
    if args.ray is not None and args.devices:
        raise CorpusError(f"--devices {args.devices} has no effect with --ray: its tasks take what the cluster has")
    if args.batch_size is not None and args.batch_size < 1:
        raise CorpusError(f"--batch-size is at least 1, got {args.batch_size}")
    devices = visible_devices(args.devices.split(",") if args.devices else None)
    if args.ray is None:
        encoder = _load(args, devices[0], args.dtype)
        size = args.batch_size or (_CPU_BATCH if devices == ["cpu"] else _GPU_BATCH)
        with _job(args, encoder, "the encoder") as job:
            if job is not None:
                encode(job, encoder, devices, batch_size=size)
        return
    with joined_ray(args.ray) as gpus:
        encoder = _load(args, devices[0], args.dtype or ("float16" if gpus else "float32"))
        with _job(args, encoder, "the encoder") as job:
            if job is not None:
                encode_on_ray(job, encoder, batch_size=args.batch_size or (_GPU_BATCH if gpus else _CPU_BATCH))


def _import(args: argparse.Namespace) -> None:
    file = FaissFlatFile.open(args.faiss)
    encoder = _load(args, _device(args), args.dtype)
    with _job(args, encoder, file.source) as job:
        if job is not None:
            import_vectors(job, file, encoder)


def _index(args: argparse.Namespace) -> None:
    queries = None
    if args.queries:
        try:
            lines = args.queries.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"cannot read --queries {args.queries}, a text file in UTF-8: {error}") from error
        queries = [line for line in lines if line.strip()]
    target = args.index or args.source.with_name(f"{args.source.name}.{args.kind}")
    moved = {"corpus": args.corpus, "model": args.model, "device": _device(args)}
    manifest = build_ann(args.source, target, args.kind, queries=queries, recall=args.recall, **moved)
    logger.info("%s: %s", target, json.dumps(manifest.measured))


def _verify(args: argparse.Namespace) -> None:
    manifest = read_manifest(args.index)
    if "encoder" in manifest.settings:
        dense.load(args.index, corpus=args.corpus, model=args.model, devices=[_device(args)])
    else:
        check_folder(args.index, manifest, args.corpus)
    facts = manifest.model_dump(exclude={"files", "format"})
    size = sum(file.bytes for file in manifest.files.values())
    logger.info("what it is:\n%s", json.dumps(facts, indent=2))
    logger.info("%s is whole: %d files, %.3f GB", args.index, len(manifest.files), size / 1e9)
