"""README's commands for several nodes as they stand there; the nodes are two addresses of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from launching import OWN, ROOT, write_script
from scorer_process import eventually, free_port
from verl.utils.siop.scoring_client import ScoringClient
from verl.utils.siop.siop_process_reward import Reference, SupportRequest

from benchmarks.marked import marked
from examples.toy_world import build

HEAD, NODE = "127.0.0.2", "127.0.0.3"
# What a node without a GPU is started with, and less memory than Ray takes of itself.
RAY = """\
#!/usr/bin/env bash
exec {python} -m ray.scripts.scripts "$@" --disable-usage-stats --num-gpus=1 --num-cpus=8 \\
    --object-store-memory=100000000{more}
"""


class Nodes:
    """Two nodes of a Ray cluster on this machine, and what is started on them.

    Args:
        folder: of logs and output.
        world: a toy world.
    """

    def __init__(self, folder: Path, world: Path) -> None:
        self.folder, self.mark, self.secret = folder, uuid.uuid4().hex, secrets.token_hex(24)
        self.seen: set[str] = set()
        self.ports = {default: str(free_port()) for default in ("6379", "8000", "8390")}
        self.temporary = tempfile.mkdtemp(prefix="siop-")  # a short path, for Ray's sockets
        more = f' $([[ "$*" != *--head* ]] || echo --temp-dir={self.temporary} --include-dashboard=false)'
        write_script(folder / "bin" / "ray", RAY.format(python=sys.executable, more=more))
        outer = {name: value for name, value in os.environ.items() if name not in OWN and "proxy" not in name.lower()}
        self.env = outer | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
            "HEAD": HEAD,
            "NODE": NODE,
            "VERL_PLATFORM": "cpu",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(24),
            "SIOP_API_TOKEN": self.secret,
            "SIOP_TEST_MARK": self.mark,
            "RETRIEVER_PORT": self.ports["8000"],
            "RETRIEVER_CORPUS_FILE": str(world / "corpus.jsonl"),
            "SIOP_PORT": self.ports["8390"],
            "SIOP_MODEL": str(world / "model"),
            "SIOP_NLI_MODEL": "none",
            "SIOP_NUM_GPUS": "0",
            "N_GPUS_PER_NODE": "0",
            "TOY_DIR": str(world),
            "OUTPUT_DIR": str(folder / "out"),
            "LOG_DIR": str(folder / "logs"),
        }

    def commands(self) -> list[str]:
        """README's, with free ports."""
        section = (ROOT / "README.md").read_text().partition("### Several nodes")[2]
        (block,) = re.findall(r"```bash\n(.*?)```", section.partition("\n### ")[0], re.DOTALL)
        for default, port in self.ports.items():
            block = block.replace(default, port)
        return block.splitlines()

    def run(self, *commands: str, kind: str = "") -> str:
        """Run the commands in one shell; returns what they print. ``seen`` has where workers of ``kind`` were then."""
        log = self.folder / f"{uuid.uuid4().hex}.log"
        script = "set -euo pipefail\n" + "\n".join(commands)
        end = time.monotonic() + 400
        with log.open("w") as file:
            process = subprocess.Popen(["bash", "-c", script], cwd=ROOT, env=self.env, stdout=file, stderr=file)
        while process.poll() is None:
            assert time.monotonic() < end, log.read_text()
            self.seen |= set(self.workers(kind)) if kind else set()
            time.sleep(0.5)
        assert process.returncode == 0, log.read_text()
        return log.read_text()

    def processes(self) -> list[psutil.Process]:
        return marked("SIOP_TEST_MARK", self.mark)

    def raylet(self, address: str) -> psutil.Process:
        (raylet,) = [process for process in self.processes() if _is_raylet(process, address)]
        return raylet

    def workers(self, kind: str) -> list[str]:
        """Addresses of the nodes on which such workers live."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith(f"ray::{kind}") or f"ray::{kind}" in " ".join(process.cmdline()):
                    parents = process.parents()
                    found += [address for address in (HEAD, NODE) if any(_is_raylet(p, address) for p in parents)]
        return sorted(found)

    def printed(self) -> str:
        """All that was printed or logged, by Ray too."""
        folders = (self.folder, Path(self.temporary))
        files = [
            file for folder in folders for file in folder.rglob("*") if file.suffix in (".log", ".out", ".err", ".yaml")
        ]
        return "\n".join(file.read_text(errors="replace") for file in files if file.is_file())

    def end(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)


def _is_raylet(process: psutil.Process, address: str) -> bool:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return command[:1] != [] and command[0].endswith("/raylet") and f"--node_ip_address={address}" in command
    return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    steps = ["--copying-steps", "1", "--imperfect-steps", "1", "--threads", "1"]
    assert build.main(["--out", str(folder), "--train-questions", "16", "--eval-questions", "4", *steps]) == 0
    return folder


@pytest.fixture
def nodes(tmp_path: Path, world: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path, world)
    yield made
    made.end()


def test_a_step_on_two_nodes(nodes: Nodes) -> None:
    *services, variables, training = nodes.commands()
    assert training == "bash train_siop.sh" and services[-1].endswith("bash launch_siop_scorer.sh")
    nodes.run(*services)
    assert len(nodes.workers("ScoringWorker")) == 1
    address = f"export RAY_ADDRESS=$HEAD:{nodes.ports['6379']}"
    said = nodes.run(address, variables, f"{training} trainer.total_training_steps=1", kind="WorkerDict")
    assert "on each of 2 nodes" in said and "done in" in said and nodes.seen == {HEAD, NODE}
    log = (nodes.folder / "logs" / "siop_train.log").read_text()
    assert float(re.findall(r"siop/tokens/computed:([\d.]+)", log)[0]) > 0  # the scorer took the token
    shards = sorted(file.name for file in (nodes.folder / "out" / "global_step_1" / "actor").glob("model_*"))
    assert shards == ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]
    assert nodes.secret not in nodes.printed()


def test_the_scorer_outlives_a_node(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, scorer = nodes.commands()[:2], nodes.commands()[5]
    nodes.run(*starts, f"export RAY_ADDRESS=$HEAD:{nodes.ports['6379']}", f"{scorer} -- --num-workers 2")
    assert nodes.workers("ScoringWorker") == [HEAD, NODE]
    monkeypatch.setenv("SIOP_API_TOKEN", nodes.secret)
    url = f"http://{HEAD}:{nodes.ports['8390']}"

    references = [Reference("r", [5, 6, 7, 8], 1, 3)]
    asked = [SupportRequest([n, 9], list(range(n, n + 20)), [0, 8, 20], references) for n in range(10, 16)]

    def support() -> list[list[list[float]]]:
        async def ask() -> list[list[list[float]]]:
            async with ScoringClient(url, timeout_s=120) as client:
                return await client.support(asked)

        return asyncio.run(ask())

    before = support()
    nodes.raylet(NODE).kill()
    for _ in range(3):
        np.testing.assert_allclose(support(), before, atol=1e-5)
    eventually(lambda: nodes.workers("ScoringWorker") == [HEAD, HEAD], 120)
    eventually(lambda: httpx.get(f"{url}/health").status_code == 200, 60)
    np.testing.assert_allclose(support(), before, atol=1e-5)
