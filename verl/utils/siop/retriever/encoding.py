"""Encoding a corpus: on the devices of this machine, or as Ray tasks on many."""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from verl.utils.siop.retriever.corpus import CorpusFile
from verl.utils.siop.retriever.encoder import Encoder, EncoderError, EncoderIdentity
from verl.utils.siop.retriever.folder import FileIdentity, Manifest
from verl.utils.siop.retriever.vector_job import VectorJob
from verl.utils.siop.retriever.vectors import write_shard

logger = logging.getLogger(__name__)

# Batches per device and call: passages of similar length meet in them, and the bar moves.
_CHUNK_BATCHES = 8
_MAX_RETRIES = 3  # of a task whose node was lost


def encode(
    job: VectorJob, encoder: Encoder, devices: Sequence[str], *, batch_size: int, show_progress: bool = True
) -> Manifest:
    """Encodes what is not there yet on the devices of this machine, and makes the folder an index.

    Args:
        job: what to encode.
        encoder: on the first of the devices.
        devices: a process for each, if there are several.
        batch_size: passages that go through the model at once.
        show_progress: show a bar.

    Raises:
        SiopError: a vector cannot be used, a shard cannot be written, or passages are not found by their vectors.
    """
    job.announce(", ".join(devices))
    chunk, started, first = _CHUNK_BATCHES * batch_size * len(devices), time.monotonic(), True
    todo = job.rows_todo
    with encoder.pool(devices) as pool, job.bar(show_progress) as bar:
        for number in job.todo:
            rows, parts = job.rows(number), []
            for at in range(rows.start, rows.stop, chunk):
                texts = _texts(job.documents, range(at, min(at + chunk, rows.stop)))
                parts.append(encoder.encode_passages(texts, batch_size=batch_size, pool=pool))
                bar.update(len(texts))
                if first:
                    _estimate(len(texts), time.monotonic() - started, todo)
                    first = False
            job.write(number, np.concatenate(parts))
    return job.finish(encoder, _measured(todo, time.monotonic() - started, devices))


def encode_on_ray(job: VectorJob, encoder: Encoder, *, batch_size: int, show_progress: bool = True) -> Manifest:
    """Encodes what is not there yet as tasks of the Ray that :func:`joined_ray` has joined, a shard each.

    A task takes a GPU where the cluster has some, else a CPU core. Corpus, index and an encoder that is a folder must
    be at the same path on every node.

    Args:
        job: what to encode.
        encoder: on this machine; tasks load the same.
        batch_size: passages that go through the model at once.
        show_progress: show a bar.

    Raises:
        SiopError: as :func:`encode`, or a task failed.
    """
    import ray

    resources, started, todo = ray.cluster_resources(), time.monotonic(), job.rows_todo
    gpus = int(resources.get("GPU", 0))
    where = f"Ray with {gpus} GPUs" if gpus else f"Ray with {int(resources.get('CPU', 0))} CPU cores"
    job.announce(where)
    with job.bar(show_progress) as bar:
        for number, identity in _ray_tasks(job, encoder.identity, batch_size, min(gpus, 1)):
            job.add(number, identity)
            bar.update(len(job.rows(number)))
            if bar.n - bar.initial == len(job.rows(number)):
                workers = min(len(job.todo), gpus or int(resources.get("CPU", 1)))
                _estimate(workers * len(job.rows(number)), time.monotonic() - started, todo)
    return job.finish(encoder, _measured(todo, time.monotonic() - started, [where]))


@contextmanager
def joined_ray(address: str) -> Iterator[bool]:
    """Joins the Ray cluster at ``address``, or at ``RAY_ADDRESS``, or starts one here; whether it has GPUs.

    Raises:
        EncoderError: there is none.
    """
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (OSError, ValueError, RuntimeError) as error:
        raise EncoderError(f"cannot join the Ray cluster at {address}: {error}") from error
    try:
        yield ray.cluster_resources().get("GPU", 0) >= 1
    finally:
        ray.shutdown()


def _ray_tasks(
    job: VectorJob, identity: EncoderIdentity, batch_size: int, gpus: int
) -> Iterator[tuple[int, FileIdentity]]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    task: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_MAX_RETRIES)(_encode_shard)
    paths = str(job.corpus.resolve()), str(job.offsets_file.resolve())
    waiting = {
        task.remote(*paths, str(job.path(number).resolve()), job.rows(number), identity, batch_size): number
        for number in job.todo
    }
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        number = waiting.pop(done)
        try:
            yield number, ray.get(done)
        except RayTaskError as error:
            raise EncoderError(f"shard {number} failed on Ray: {error.cause or error}") from error
        except RayError as error:
            raise EncoderError(f"shard {number} failed on Ray: {error}") from error


def _encode_shard(
    corpus: str, offsets: str, shard: str, rows: range, identity: EncoderIdentity, batch_size: int
) -> FileIdentity:
    for path in (corpus, offsets):
        if not Path(path).is_file():
            raise EncoderError(f"{socket.gethostname()} has no {path}: every node of the cluster must see it")
    encoder = _encoder_of_worker(identity, "cuda:0" if torch.cuda.is_available() else "cpu")
    documents = CorpusFile(Path(corpus), np.load(offsets, mmap_mode="r"))
    chunk = _CHUNK_BATCHES * batch_size
    parts = [
        encoder.encode_passages(_texts(documents, rows[at : at + chunk]), batch_size=batch_size)
        for at in range(0, len(rows), chunk)
    ]
    return write_shard(Path(shard), np.concatenate(parts))


@functools.lru_cache(maxsize=1)
def _encoder_of_worker(identity: EncoderIdentity, device: str) -> Encoder:
    # Ray's processes are used for many tasks.
    return Encoder.load_same(identity, device=device)


def _texts(documents: CorpusFile, rows: range) -> list[str]:
    return [documents[row]["contents"] for row in rows]


def _estimate(passages: int, seconds: float, todo: int) -> None:
    rate = passages / max(seconds, 1e-9)
    logger.info("%.3g passages/s by the first of them: about %s for %d", rate, _duration(todo / rate), todo)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def _measured(passages: int, seconds: float, devices: Sequence[str]) -> dict[str, Any]:
    # Of the last run, where there were several.
    return {"encoded": {"passages": passages, "seconds": round(seconds, 1), "devices": list(devices)}}
