"""Retriever and scorer of a toy world for the length of a ``with`` block, through the launchers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from launch_variables import TABLE  # noqa: E402

_LAUNCHERS = ("launch_retriever.sh", "launch_siop_scorer.sh")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def toy_services(toy: Path, logs: Path, **extra: str) -> Iterator[dict[str, str]]:
    """The environment in which train_siop.sh and eval_siop.sh use this world, on a CPU; ``extra`` is added to it.

    Raises:
        subprocess.CalledProcessError: a service did not start; its launcher has said why.
    """
    retriever, scorer = _free_port(), _free_port()
    # What is set for other runs would win over the toy world's.
    known = {row.name for row in TABLE} - {"OMP_NUM_THREADS", "SIOP_API_TOKEN", "SIOP_START_TIMEOUT"}
    env = {
        **{name: value for name, value in os.environ.items() if name not in known},
        "VIRTUAL_ENV": sys.prefix,
        "LOG_DIR": str(logs.resolve()),
        "TOY_DIR": str(toy),
        "N_GPUS_PER_NODE": "0",
        "RETRIEVER_CORPUS_FILE": str(toy / "corpus.jsonl"),
        "RETRIEVER_PORT": str(retriever),
        "RETRIEVER_URL": f"http://127.0.0.1:{retriever}/retrieve",
        "SIOP_MODEL": str(toy / "model"),
        "SIOP_NLI_MODEL": "none",
        "SIOP_NUM_GPUS": "0",
        "SIOP_PORT": str(scorer),
        "SIOP_SCORER_URL": f"http://127.0.0.1:{scorer}",
        "EVAL_TEMPERATURE": "1",
        **extra,
    }
    started: list[str] = []
    try:
        for launcher in _LAUNCHERS:
            started.append(launcher)
            try:
                subprocess.run(["bash", launcher], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
            except subprocess.CalledProcessError:
                started.remove(launcher)  # it has left nothing, or what runs belongs to another call
                raise
        yield env
    finally:
        for launcher in started:
            subprocess.run(["bash", launcher, "stop"], cwd=ROOT, env=env, check=False, stdout=subprocess.DEVNULL)
