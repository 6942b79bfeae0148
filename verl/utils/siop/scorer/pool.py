"""The scorer's Ray workers: started on a cluster or on a private local Ray, watched, and called by least load.

By hand, because ``ray.util.ActorPool`` knows neither actors that die and come back nor how much each has to do, and Ray
Serve brings a front and a controller of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.scorer.engines.base import RolloutQuery, SupportResult
from verl.utils.siop.scorer.engines.loading import as_config_error, one_line
from verl.utils.siop.scorer.engines.nli import AnswerGroup, LexicalNli
from verl.utils.siop.scorer.ray_dir import RayDir
from verl.utils.siop.scorer.workers import NliResult, NliWorker, ScoringWorker, WorkerInfo, WorkerSettings

logger = logging.getLogger(__name__)

RAY_OPTIONS: dict[str, Any] = {"namespace": "siop-scorer", "logging_level": logging.WARNING, "log_to_driver": True}
OBJECT_STORE_BYTES = 128 * 1024 * 1024
MAX_RESTARTS = 100
WATCH_INTERVAL_S = 2.0
RAY_STARTS = 3  # Ray gives itself 30 s, which a busy machine may exceed
# Of each GPU, as Ray counts; it places by this and limits nothing.
NLI_GPU_SHARE = 0.2


class NoWorker(SiopError, RuntimeError):
    """No worker can take the request now (HTTP 503)."""


@dataclass
class _Worker:
    handle: Any
    index: int
    kind: str = "worker"
    up: bool = False
    outstanding: int = 0
    recovery: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"


class WorkerPool:
    """Scoring workers, NLI workers, and the Ray they run on.

    The two kinds are processes of their own, so that neither waits for the other. On GPUs every scoring worker leaves a
    share of its GPU to one NLI worker; if it takes several whole GPUs, the NLI workers run on CPU. On CPU there is one
    NLI worker. The lexical backend needs none: it runs in a thread of this process.

    Args:
        settings: what the workers load.
        num_workers: how many scoring workers.
        gpus_per_worker: GPUs of each, 0 on CPU.
        restart_wait_s: how long a request waits for a worker when all have died.

    Attributes:
        info: limits and identity of the models, None until :meth:`load` has returned.
        num_workers: scoring workers that were asked for.
    """

    def __init__(
        self, settings: WorkerSettings, num_workers: int, gpus_per_worker: float = 0, restart_wait_s: float = 120.0
    ) -> None:
        self.info: WorkerInfo | None = None
        self.num_workers = num_workers
        self._settings, self._gpus = settings, gpus_per_worker
        self._restart_wait_s = restart_wait_s
        self._workers: list[_Worker] = []
        self._nli_workers: list[_Worker] = []
        self._lexical = LexicalNli() if settings.nli_backend == "lexical" else None
        self._ray_dir: RayDir | None = None

    @property
    def num_up(self) -> int:
        """Scoring workers that are ready now."""
        return sum(worker.up for worker in self._workers)

    @property
    def num_nli_workers(self) -> int:
        """NLI workers that were asked for."""
        return 0 if self._lexical else self.num_workers if self._gpus else 1

    @property
    def num_nli_up(self) -> int:
        """NLI workers that are ready now."""
        return sum(worker.up for worker in self._nli_workers)

    @property
    def is_complete(self) -> bool:
        """Whether all workers of both kinds are ready."""
        return (self.num_up, self.num_nli_up) == (self.num_workers, self.num_nli_workers)

    def start(self) -> None:
        """Join the cluster of ``RAY_ADDRESS``, or start a small private Ray, and create the workers.

        Blocks; call it from the main thread. The private Ray's processes die with the thread that started them.

        Raises:
            SiopConfigError: the cluster cannot be joined or has too few GPUs.
        """
        address = os.environ.get("RAY_ADDRESS")
        joined = bool(address and address != "local")
        if joined:
            _join_cluster(str(address))
        else:
            self._ray_dir = RayDir()
            _start_private_ray(self._ray_dir.path, int(self.num_workers * self._gpus))
        if self._gpus:
            by_node = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
            check_gpus(self.num_workers, self._gpus, by_node)
        on_gpu = self._gpus == 1 and self.num_nli_workers and self._settings.nli_device != "cpu"
        nli_share = NLI_GPU_SHARE if on_gpu else 0.0
        nli_settings = self._settings if nli_share else replace(self._settings, device="cpu")
        # The scoring workers first: each takes the most of a GPU, and the NLI workers then fit beside them only.
        self._workers = [
            _Worker(_create(ScoringWorker, self._settings, self._gpus - nli_share, spread=joined), index)
            for index in range(self.num_workers)
        ]
        self._nli_workers = [
            _Worker(_create(NliWorker, nli_settings, nli_share), index, "NLI worker")
            for index in range(self.num_nli_workers)
        ]

    async def load(self) -> None:
        """Wait until every worker has loaded its models.

        Raises:
            SiopConfigError: a model cannot be loaded or used.
            NoWorker: a worker died while it was loading.
        """

        async def load(worker: _Worker) -> Any:
            loaded = await worker.handle.load.remote()
            worker.up = True
            return loaded

        try:
            # On a shared GPU the NLI model first: an engine that reserves memory counts what is free.
            names = await asyncio.gather(*map(load, self._nli_workers if self._gpus else []))
            names += await asyncio.gather(*map(load, [*self._nli_workers, *self._workers]))
        except RayTaskError as error:
            raise _own_error(error) from error
        except RayActorError as error:
            raise NoWorker(f"a scoring worker died while loading its models (out of memory?): {error}") from error
        self.info = WorkerInfo(engine=names[-1], nli=self._lexical.name if self._lexical else names[0])

    async def watch(self) -> None:
        """Notice dead workers while there are no requests; runs until cancelled."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            for worker in self._workers + self._nli_workers:
                if worker.up:
                    try:
                        await asyncio.wait_for(worker.handle.ping.remote(), timeout=10)
                    except RayActorError as error:
                        self._lost(worker, error)
                    except asyncio.TimeoutError:
                        logger.warning("%s is slow to answer a ping", worker)

    def _lost(self, worker: _Worker, error: RayActorError) -> None:
        worker.up = False
        if worker.recovery is None or worker.recovery.done():
            logger.error("%s died, Ray restarts it: %s", worker, one_line(error))
            worker.recovery = asyncio.create_task(self._recover(worker))

    async def _recover(self, worker: _Worker) -> None:
        while True:
            try:
                await worker.handle.load.remote()
            except RayActorError:
                await asyncio.sleep(1.0)
            except RayTaskError as error:
                logger.error("%s cannot load its model again: %s", worker, error.cause)
                await asyncio.sleep(10.0)
            else:
                worker.up = True
                logger.info("%s is back", worker)
                return

    @staticmethod
    async def _pick(workers: list[_Worker], wait_s: float) -> _Worker:
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            up = [worker for worker in workers if worker.up]
            if up:
                return min(up, key=lambda worker: worker.outstanding)
            if asyncio.get_running_loop().time() >= deadline:
                raise NoWorker(f"none of {len(workers)} is up: {', '.join(map(str, workers))}")
            await asyncio.sleep(0.1)

    async def _call(self, method: str, payload: Any, cost: int) -> Any:
        """Call the least loaded worker; if it dies, once more on another one or on the restarted one."""
        if self._lexical and method != "support":
            return NliResult(await asyncio.to_thread(getattr(self._lexical, method), payload))
        workers = self._workers if method == "support" else self._nli_workers
        for attempt in range(2):
            worker = await self._pick(workers, self._restart_wait_s if attempt else 0.0)
            worker.outstanding += cost
            try:
                return await getattr(worker.handle, method).remote(payload)
            except RayActorError as error:
                self._lost(worker, error)
                last = error
            except RayTaskError as error:
                raise _own_error(error) from error
            finally:
                worker.outstanding -= cost
        raise NoWorker("the scoring worker died twice with this request") from last

    async def support(self, rollouts: Sequence[RolloutQuery]) -> SupportResult:
        """Score rollouts; with several workers, rollouts with the same prompt stay on one of them.

        Raises:
            InvalidRequest, ScorerError: as the engine.
            NoWorker: no worker is up, or workers died twice.
        """
        parts = partition(rollouts, max(1, self.num_up))
        results: list[SupportResult] = await asyncio.gather(
            *(
                self._call("support", [rollouts[i] for i in part], sum(rollouts[i].num_tokens for i in part))
                for part in parts
            )
        )
        support: list[list[list[float]]] = [[] for _ in rollouts]
        errors: dict[int, str] = {}
        for part, result in zip(parts, results, strict=True):
            errors.update({part[index]: message for index, message in result.errors.items()})
            for index, scores in zip(part, result.support, strict=True):
                support[index] = scores
        return SupportResult(
            support=support,
            computed_tokens=sum(result.computed_tokens for result in results),
            requested_tokens=sum(result.requested_tokens for result in results),
            errors=dict(sorted(errors.items())),
        )

    async def cluster(self, groups: Sequence[AnswerGroup]) -> NliResult[list[int]]:
        """Cluster ids of each group; errors as :meth:`support`."""
        cost = sum(len(group.question) + len(answer) for group in groups for answer in group.answers)
        return await self._call("cluster", list(groups), cost)

    async def entailment(self, pairs: Sequence[tuple[str, str]]) -> NliResult[float]:
        """P(premise entails hypothesis); errors as :meth:`support`."""
        return await self._call("entailment", list(pairs), sum(len(p) + len(h) for p, h in pairs))

    def close(self) -> None:
        """Stop the workers and the private Ray. Safe to call more than once."""
        for worker in self._workers + self._nli_workers:
            if worker.recovery is not None:
                worker.recovery.cancel()
            if ray.is_initialized():
                ray.kill(worker.handle, no_restart=True)
        self._workers, self._nli_workers = [], []
        ray.shutdown()  # also what an interrupted start has left
        if self._ray_dir is not None:
            self._ray_dir.remove()
            self._ray_dir = None


def _join_cluster(address: str) -> None:
    what = (
        f"cannot join the Ray cluster at RAY_ADDRESS={address} (one with token authentication needs "
        "RAY_AUTH_MODE=token and its token)"
    )
    logger.info("joining the Ray cluster at %s", address)
    with as_config_error(what, (OSError, ValueError, RuntimeError, RayError)):
        # Ray itself tries for minutes before it says that nobody is there.
        if match := re.fullmatch(r"(?:ray://)?([^:]+):(\d+)", address):
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        ray.init(address=address, **RAY_OPTIONS)


def _start_private_ray(directory: Path, num_gpus: int) -> None:
    for attempts_left in reversed(range(RAY_STARTS)):
        try:
            with as_config_error("a private Ray could not be started", Exception):  # that is what Ray raises
                ray.init(
                    address="local",
                    include_dashboard=False,
                    num_cpus=0,  # no idle workers; ours ask for no CPU share
                    num_gpus=num_gpus,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(directory),
                    **RAY_OPTIONS,
                )
            return
        except SiopConfigError as error:
            if not attempts_left:
                raise
            logger.warning("%s; trying again", error)
            ray.shutdown()


def waiting_threads() -> dict[str, str]:
    """Variables with which OpenMP's threads spin for a moment and then sleep, as in ``scripts/common.sh``: longer, they
    take the cores of other processes, and of the threads that they wait for. What the environment says counts.
    """
    given = {name: value for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if (value := os.environ.get(name))}
    return given if "OMP_WAIT_POLICY" in given else {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000", **given}


def _create(kind: type, settings: WorkerSettings, num_gpus: float, spread: bool = False) -> Any:
    """A worker of a private Ray, or, with ``spread``, of a cluster, where the loss of one node leaves the others'."""
    options: dict[str, Any] = {
        "scheduling_strategy": "SPREAD" if spread else "DEFAULT",
        "num_cpus": 0.001 if spread and not num_gpus else 0,  # Ray spreads what takes something
        "num_gpus": num_gpus,
        "max_restarts": MAX_RESTARTS,
        "concurrency_groups": {"health": 1},
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(settings.threads), **waiting_threads()}},
    }
    return ray.remote(**options)(kind).remote(settings)


def check_gpus(num_workers: int, gpus_per_worker: float, gpus_by_node: Sequence[float]) -> None:
    """Refuse workers that no placement has room for; a worker's GPUs are on one node.

    Raises:
        SiopConfigError: there is room for fewer workers.
    """
    room = sum(int(gpus // gpus_per_worker) for gpus in gpus_by_node)
    if num_workers > room:
        nodes = ", ".join(f"{gpus:g}" for gpus in gpus_by_node)
        raise SiopConfigError(
            f"{num_workers * gpus_per_worker:g} GPUs are asked for, {gpus_per_worker:g} by each worker on one "
            f"node; the Ray cluster has {sum(gpus_by_node):g} ({nodes} by node), room for {room} worker(s)"
        )


def partition(rollouts: Sequence[RolloutQuery], num_parts: int) -> list[list[int]]:
    """Split a request into at most ``num_parts`` parts of about equal tokens; equal prompts stay together.

    Returns:
        Indices of each part; no part is empty unless the request is.
    """
    if num_parts <= 1 or len(rollouts) <= 1:
        return [list(range(len(rollouts)))]
    groups: dict[bytes, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        groups.setdefault(rollout.prompt_ids.tobytes(), []).append(index)
    # In the order of their bytes, so that prompts which share a prefix tend to stay together too.
    ordered = [groups[key] for key in sorted(groups)]
    costs = [sum(rollouts[i].num_tokens for i in group) for group in ordered]
    share = sum(costs) / num_parts
    parts: list[list[int]] = [[]]
    filled = 0.0
    for group, cost in zip(ordered, costs, strict=True):
        if parts[-1] and filled + cost / 2 > share * len(parts) and len(parts) < num_parts:
            parts.append([])
        parts[-1].extend(group)
        filled += cost
    return parts


def _own_error(error: RayTaskError) -> Exception:
    """The exception that the worker raised, without Ray's wrapping."""
    return error.cause if isinstance(error.cause, Exception) else error
