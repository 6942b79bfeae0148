"""Everything that can go wrong between the client and the scoring service, with real processes and real HTTP.

Every result is compared with what the models give when they are called directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import httpx
import psutil
import pytest
from faulty_proxy import EDITS, STATUS, TRANSPORT, FaultyProxy
from known_requests import Known, KnownRequests
from ray.exceptions import RayActorError
from scorer_process import ScorerProcess, eventually, free_port, launcher
from tiny_models import save_causal_lm, save_classifier
from verl.utils.siop import scoring_client
from verl.utils.siop.errors import ScorerError, ScorerUnavailable, SiopConfigError
from verl.utils.siop.scorer.guard import Guard
from verl.utils.siop.scorer.pool import NoWorker, WorkerPool, _Worker
from verl.utils.siop.scorer.ray_dir import RayDir
from verl.utils.siop.scorer.workers import WorkerSettings
from verl.utils.siop.scoring_client import ScoringClient


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_causal_lm(root / "lm"), save_classifier(root / "nli")


@pytest.fixture(scope="module")
def known(models) -> KnownRequests:
    return KnownRequests(*models)


class Service:
    """A scorer with two workers that can be killed and started again on its port."""

    def __init__(self, models: tuple[Path, Path], folder: Path) -> None:
        self._models, self._folder = models, folder
        self._starts = itertools.count()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.ready: dict = {}
        self.killed: ScorerProcess | None = None
        self.progress: list[str] = []

    def start(self) -> None:
        """Start it without waiting."""
        arguments = f"--model {self._models[0]} --nli-model {self._models[1]} --num-workers 2".split()
        self.process = ScorerProcess(arguments, self._folder / f"{next(self._starts)}.log", port=self.port)

    def metric(self, name: str) -> float:
        """Value of a metric without labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = re.search(rf"^{name} (\S+)$", text, re.M)
        assert found, text
        return float(found[1])

    def ray_dir(self) -> Path:
        """Directory of its private Ray."""
        for pid in self.process.members():
            with contextlib.suppress(OSError):
                if found := re.search(r"/tmp/siop-\w+", Path(f"/proc/{pid}/cmdline").read_text()):
                    return Path(found[0])
        raise AssertionError("no process names the directory of Ray")


@pytest.fixture(scope="module")
def service(models, tmp_path_factory) -> Iterator[Service]:
    """Started two seconds after a client began to wait for it."""
    service = Service(models, tmp_path_factory.mktemp("service"))

    async def wait() -> dict:
        async with ScoringClient(service.url) as client:
            return await client.wait_ready(600)

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            service.progress.append(record.getMessage())

    logger, handler = logging.getLogger(scoring_client.__name__), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    timer = threading.Timer(2.0, service.start)
    timer.start()
    try:
        try:
            service.ready = asyncio.run(wait())
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            timer.join()
        yield service
        if service.killed:
            eventually(lambda: not names(service.killed), 90)
    finally:
        service.process.kill()


def names(process: ScorerProcess) -> list[str]:
    """Command lines of the living processes of a scorer."""
    found = []
    for pid in process.members():
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_text().strip("\0 ").replace("\0", " "))
    return [name for name in found if name]  # a process that is just ending has none


def ask(url: str, *known: Known, **options) -> list[BaseException | None]:
    """Ask for all at once and check the answers; returns what was raised, None for a right answer.

    A wrong answer fails the test.
    """

    async def run() -> list[BaseException | None]:
        async with ScoringClient(url, **{"timeout_s": 120, "backoff_s": 0.02, **options}) as client:
            return await asyncio.gather(*(request.check(client) for request in known), return_exceptions=True)

    outcomes = asyncio.run(run())
    for outcome in outcomes:
        if outcome is not None and not isinstance(outcome, (ScorerError, ScorerUnavailable)):
            raise outcome
    return outcomes


def failures(caplog) -> list[str]:
    """Warnings of the client about attempts that failed."""
    return [record.getMessage() for record in caplog.records if " failed: " in record.getMessage()]


# ------------------------------------------------------------------ the scorer is not there
def test_not_started_is_unavailable_with_address_attempts_and_last_error(known, caplog):
    url = f"http://127.0.0.1:{free_port()}"
    for request, path in (
        (known.support(1), "support"),
        (known.cluster(1), "cluster"),
        (known.entailment(1), "nli_score"),
    ):
        (error,) = ask(url, request, attempts=3)
        assert isinstance(error, ScorerUnavailable) and isinstance(error, ConnectionError)
        assert (error.url, error.attempts) == (f"{url}/{path}", 3)
        assert "ConnectError" in error.last_error and error.last_error in str(error)
    assert len(failures(caplog)) == 6


def test_waiting_for_a_scorer_ends(caplog):
    caplog.set_level(logging.INFO)
    url = f"http://127.0.0.1:{free_port()}"

    async def wait(url: str) -> None:
        async with ScoringClient(url) as client:
            await client.wait_ready(0.6)

    with pytest.raises(ScorerUnavailable, match=f"{url} after . attempt.*ConnectError"):
        asyncio.run(wait(url))
    assert f"waiting for the scorer at {url}, 0 of 1 s" in caplog.text


def test_started_late_is_waited_for_with_a_progress_line(service):
    assert (service.ready["status"], service.ready["num_workers"]) == ("healthy", 2)
    assert service.progress[0].startswith(f"waiting for the scorer at {service.url}, 0 of 600 s: ConnectError")
    assert service.progress[-1].startswith(f"scorer at {service.url} is ready")


# ------------------------------------------------------------------ processes die
def test_one_of_two_workers_is_killed_in_the_middle_of_a_batch(service, known):
    requests = [known.support(seed, size=150) for seed in range(100, 106)]
    first, second = service.process.worker_pids()
    outcomes: list[list] = []
    thread = threading.Thread(target=lambda: outcomes.append(ask(service.url, *requests)), daemon=True)
    thread.start()
    eventually(lambda: service.metric("siop_scorer_in_flight") >= 4)
    os.kill(first, signal.SIGKILL)

    def degraded() -> dict | None:
        health = httpx.get(f"{service.url}/health", timeout=30)
        return health.json() if health.status_code == 503 else None

    health = eventually(degraded)
    assert (health["status"], health["num_workers"]) == ("degraded", 1)
    thread.join(120)
    assert outcomes == [[None] * len(requests)]
    assert service.process.wait_healthy(120)["num_workers"] == 2
    pids = service.process.worker_pids()
    assert second in pids and first not in pids and len(pids) == 2
    log = service.process.log.read_text()
    assert len(re.findall(r"\d died, Ray restarts it", log)) == 1
    assert not re.search(r"POST \S+ 5\d\d", log)  # the front itself asked the other worker
    assert ask(service.url, *requests) == [None] * len(requests)


def test_the_front_is_killed_in_the_middle_of_a_batch_and_started_again(service, known, caplog):
    requests = [known.support(seed, size=150) for seed in range(200, 206)]
    outcomes: list[list] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(ask(service.url, *requests, attempts=1000, backoff_s=0.1, deadline_s=600)),
        daemon=True,
    )
    killed, ray_dir = service.process, service.ray_dir()
    thread.start()
    eventually(lambda: service.metric("siop_scorer_in_flight") >= 4)
    killed.process.kill()
    killed.process.wait(10)
    # Those that are not that patient get an error.
    (error,) = ask(service.url, known.support(7), attempts=3)
    assert isinstance(error, ScorerUnavailable) and error.attempts == 3
    (error,) = ask(service.url, known.support(7), attempts=1000, deadline_s=0.5)
    assert isinstance(error, ScorerUnavailable) and error.attempts < 100
    # Ray has ended with its front, but for two helpers that need a minute to notice it; see the fixture.
    eventually(
        lambda: not [name for name in names(killed) if not re.fullmatch("ray::(Dashboard|RuntimeEnv)Agent", name)]
    )
    service.killed = killed
    assert ray_dir.is_dir()

    service.start()
    thread.join(400)
    assert outcomes == [[None] * len(requests)]
    interrupted = [line for line in failures(caplog) if "attempt 1 of 1000" in line]
    assert any("ReadError" in line or "RemoteProtocolError" in line for line in interrupted), interrupted
    service.process.wait_healthy(120)
    assert not ray_dir.exists() and not ray_dir.with_suffix(".lock").exists()


def test_a_directory_of_ray_is_removed_by_its_owner_or_after_its_death():
    mine = RayDir()
    (mine.path / "file").touch()
    killed = RayDir()
    (killed.path / "file").touch()
    os.close(killed._descriptor)  # as the system does for a process that ends
    other = RayDir()
    try:
        assert mine.path.is_dir() and other.path.is_dir() and not killed.path.exists()
    finally:
        mine.remove()
        other.remove()
    for directory in (mine, killed, other):
        assert not directory.path.exists() and not directory.path.with_suffix(".lock").exists()


def test_a_ray_that_does_not_start_is_tried_again_and_then_named(monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("verl.utils.siop.scorer.pool.ray.init", init)
    pool = WorkerPool(WorkerSettings(model="unused"), num_workers=1)
    with pytest.raises(SiopConfigError, match="a private Ray could not be started: The current node timed out during"):
        pool.start()
    assert len(calls) == 3
    pool.close()


@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_a_request_whose_worker_dies_is_sent_once_more_and_to_another_worker(deaths):
    calls = []

    class Handle:
        def __init__(self, index: int) -> None:
            self.index = index
            self.support, self.load = self, self

        def remote(self, *payload):
            async def answer():
                if not payload:  # load, of a worker that is being restarted
                    await asyncio.sleep(3600)
                calls.append(self.index)
                if len(calls) <= deaths:
                    raise RayActorError()
                return payload[0]

            return answer()

    async def run():
        pool = WorkerPool(WorkerSettings(model="unused"), num_workers=3)
        pool._workers = [_Worker(Handle(index), index, up=True) for index in range(3)]
        try:
            return await pool._call("support", "payload", 1), pool.num_up
        finally:
            for worker in pool._workers:
                assert worker.outstanding == 0
                if worker.recovery:
                    worker.recovery.cancel()

    if deaths < 2:
        assert asyncio.run(run()) == ("payload", 3 - deaths)
    else:
        with pytest.raises(NoWorker, match="died twice"):
            asyncio.run(run())
    assert calls == [0, 1][: deaths + 1]


# ------------------------------------------------------------------ messages are lost or spoiled
FAULTS = (*TRANSPORT, *STATUS, *EDITS)


def test_whatever_is_spoiled_on_its_way_is_asked_again(service, known, caplog):
    requests = [known.support(seed) for seed in range(3 * len(FAULTS))]
    with FaultyProxy(service.port, FAULTS, every=2) as proxy:
        outcomes = ask(proxy.url, *requests, attempts=30, timeout_s=5, deadline_s=300, max_concurrency=6)
        assert outcomes == [None] * len(requests)
        assert set(proxy.spoiled) == set(FAULTS)
        assert len(failures(caplog)) >= proxy.spoiled.total()
        assert proxy.requests >= len(requests) + proxy.spoiled.total()
    for words in (
        "RemoteProtocolError",  # dropped
        "no answer within 5 s",
        "does not match its Content-Digest",
        "HTTP 400: the body does not match its Content-Digest",
        "the answer is that of another request",
        "HTTP 502: busy",
        "HTTP 503: busy",
        "HTTP 504: busy",
        "'nan' is not a number",
        "'-inf' is not a number",
        "'None' is not a number",
        "'1.5' is not a number from -1.79",
        "a list of 3 was expected",
        "a list of 2 was expected",
        "KeyError: 'support'",
        "JSONDecodeError",
    ):
        assert words in caplog.text


def test_without_another_attempt_a_spoiled_message_is_an_error_and_all_others_are_right(service, known):
    requests = [known.support(seed) for seed in range(2 * len(FAULTS))]
    with FaultyProxy(service.port, FAULTS, every=2) as proxy:
        outcomes = ask(proxy.url, *requests, attempts=1, timeout_s=5, max_concurrency=4)
        assert sum(outcome is not None for outcome in outcomes) >= proxy.spoiled.total() == len(FAULTS)
        assert sum(isinstance(outcome, ScorerError) for outcome in outcomes) == len(EDITS)
        assert all(outcome.attempts == 1 for outcome in outcomes if isinstance(outcome, ScorerUnavailable))


def test_a_flipped_bit_anywhere_in_an_answer_never_makes_a_score(service, known):
    requests = [known.mixed(seed) for seed in range(200)]
    with FaultyProxy(service.port, ["flip_anywhere"]) as proxy:
        outcomes = ask(proxy.url, *requests, attempts=1, timeout_s=5, max_concurrency=4)
        # A bit of "connection: close" may be the other one: then the client's next request goes into a connection that
        # ends, and the proxy does not see it.
        assert len(requests) - 10 <= proxy.spoiled.total() <= len(requests)
    # Some headers say nothing about the scores.
    assert len(requests) / 2 < sum(outcome is not None for outcome in outcomes) < len(requests)


def test_slow_answers_end_at_the_deadline(service, known):
    for fault in ("hang", "trickle"):
        with FaultyProxy(service.port, [fault]) as proxy:
            (error,) = ask(proxy.url, known.support(1), attempts=1000, timeout_s=0.5, deadline_s=2)
            assert isinstance(error, ScorerUnavailable)
            assert 1 <= error.attempts < 10
            assert "no answer within" in error.last_error


@pytest.mark.parametrize("field", ["sha-256=:AAAA:", "sha-512=:x:, sha-256=:AAAA:"])
def test_the_service_refuses_a_body_that_is_not_the_one_of_its_digest(service, field):
    response = httpx.post(
        f"{service.url}/support", json={"rollouts": []}, headers={"Content-Digest": field}, timeout=60
    )
    assert (response.status_code, response.json()) == (400, {"detail": "the body does not match its Content-Digest"})
    # Of an algorithm that it does not know, it cannot tell.
    response = httpx.post(
        f"{service.url}/support", json={"rollouts": []}, headers={"Content-Digest": "md5=:AAAA:"}, timeout=60
    )
    assert response.status_code == 200
    assert scoring_client.is_intact(response.content, response.headers["Content-Digest"])
    assert not scoring_client.is_intact(response.content + b" ", response.headers["Content-Digest"])


# ------------------------------------------------------------------ the service is busy
def test_a_storm_of_503_is_waited_out(service, known, monkeypatch):
    requests = [known.mixed(seed) for seed in range(8)]
    drawn = []

    def uniform(low, high):
        drawn.append((low, high))
        return random.Random(len(drawn)).uniform(low, high)

    monkeypatch.setattr(scoring_client.random, "uniform", uniform)
    with FaultyProxy(service.port, ["503"] * 20 + [None] * 1000, retry_after="1") as proxy:
        assert ask(proxy.url, *requests, attempts=30, backoff_s=0.25) == [None] * len(requests)
        assert proxy.spoiled == {"503": 20}
        for times in proxy.arrivals.values():
            assert all(later - earlier >= 1 for earlier, later in itertools.pairwise(times))
    # Twice the pause after each failure, and jitter of up to as much; 20 failures of 8 requests: one had three.
    pauses = sorted(set(drawn))
    assert pauses == [(0, 0.25 * 2**failed) for failed in range(len(pauses))] and len(pauses) >= 3


def test_a_storm_of_503_that_does_not_end_is_unavailable(service, known):
    with FaultyProxy(service.port, ["503"], retry_after="0") as proxy:
        (error,) = ask(proxy.url, known.support(1), attempts=4)
        assert isinstance(error, ScorerUnavailable) and error.attempts == proxy.requests == 4
        assert error.last_error == "HTTP 503: busy"


def test_retry_after_may_be_a_date():
    assert scoring_client._seconds("17") == 17
    assert 50 < scoring_client._seconds(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert scoring_client._seconds(None) is scoring_client._seconds("soon") is scoring_client._seconds("²") is None


def test_no_more_requests_at_once_than_allowed(service, known):
    requests = [known.mixed(seed) for seed in range(24)]
    with FaultyProxy(service.port, together=3) as proxy:
        assert ask(proxy.url, *requests, max_concurrency=3) == [None] * len(requests)
        assert proxy.most_open == 3


def test_connections_are_kept(service, known):
    """One after the other, requests go over one connection."""
    ports = set()

    async def run() -> None:
        async with ScoringClient(service.url, max_concurrency=3) as client:
            for seed in range(5):
                await known.mixed(seed).check(client)
                ports.update(
                    connection.laddr.port
                    for connection in psutil.Process().net_connections("tcp4")
                    if connection.raddr and connection.raddr.port == service.port
                )

    asyncio.run(run())
    assert len(ports) == 1


def test_a_body_that_does_not_arrive_frees_its_place():
    sent, logged = [], []

    class Metric:
        def __getattr__(self, name):
            return lambda *args: logged.append((name, args)) or self

    class Metrics:
        requests = seconds = in_flight = Metric()

    async def receive():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    guard = Guard(None, Metrics(), 1000, 1, body_timeout_s=0.05)
    scope = {"type": "http", "method": "POST", "path": "/support", "headers": []}
    for _ in range(2):
        asyncio.run(guard(scope, receive, send))
    assert [message["status"] for message in sent if "status" in message] == [408, 408]
    assert b"did not arrive within 0.05 s" in sent[1]["body"]
    assert guard._app.pending == 0


# ------------------------------------------------------------------ the launcher
def test_launcher_passes_every_variable_on_starts_once_and_notices_a_killed_service(models, tmp_path):
    port = free_port()
    env = {
        "SIOP_MODEL": str(models[0]),
        "SIOP_NLI_MODEL": str(models[1]),
        "SIOP_HOST": "localhost",
        "SIOP_ENGINE": "transformers",
        "SIOP_DTYPE": "bfloat16",
        "SIOP_MAX_MODEL_LEN": "64",
        "SIOP_START_TIMEOUT": "280",
        "SIOP_API_TOKEN": "secret",
    }
    with ThreadPoolExecutor() as threads:
        two = [threads.submit(launcher, tmp_path, port, "start", "--", "--threads", "1", **env) for _ in range(2)]
        started, refused = sorted((start.result() for start in two), key=lambda start: start.returncode)
    pid = int((tmp_path / "siop_scorer.pid").read_text())
    try:
        assert (started.returncode, refused.returncode) == (0, 1), started.stderr + refused.stderr
        assert "is just being started by someone else" in refused.stderr
        assert f"(process {pid})" in started.stdout
        health = httpx.get(f"http://localhost:{port}/health", timeout=60).json()
        assert (health["status"], health["engine"], health["max_model_len"]) == ("healthy", "transformers", 64)
        assert health["model"] == str(models[0]) and health["nli"].endswith(str(models[1]))
        assert httpx.post(f"http://localhost:{port}/support", json={"rollouts": []}, timeout=60).status_code == 401
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        for option in (("--host", "localhost"), ("--dtype", "bfloat16"), ("--num-gpus", "0"), ("--threads", "1")):
            assert command[command.index(option[0]) + 1] == option[1]
    finally:
        os.kill(pid, signal.SIGKILL)
    # Until the killed process is reaped it is "running but not healthy".
    eventually(lambda: "siop_scorer is not running" in launcher(tmp_path, port, "status", **env).stdout)
    assert launcher(tmp_path, port, "status", **env).returncode == 1
    stopped = launcher(tmp_path, port, "stop", **env)
    assert stopped.returncode == 0 and not (tmp_path / "siop_scorer.pid").exists()
