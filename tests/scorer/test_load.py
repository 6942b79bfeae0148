"""Many clients of one scoring service at once: every answer is the right one, and memory stays bounded."""

from __future__ import annotations

import asyncio
import logging
import os
import time

import psutil
from known_requests import KnownRequests
from scorer_process import ScorerProcess
from tiny_models import save_causal_lm, save_classifier
from verl.utils.siop.scoring_client import ScoringClient

CLIENTS = 64
SECONDS = float(os.environ.get("SIOP_LOAD_TEST_SECONDS", "60"))
# Of the front and its two workers, from the end of the first third to the end.
GROWTH_MB = 64


def memory_mb(pids: list[int]) -> float:
    """Resident memory of processes."""
    return sum(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20


def test_64_clients_get_their_own_answers_in_bounded_memory(tmp_path, caplog):
    lm, nli = save_causal_lm(tmp_path / "lm"), save_classifier(tmp_path / "nli")
    known = KnownRequests(lm, nli)
    # Four requests of its own for each client; no two are the same.
    requests = [[known.mixed(4 * client + kind) for kind in range(4)] for client in range(CLIENTS)]
    scorer = ScorerProcess(f"--model {lm} --nli-model {nli}".split(), tmp_path / "scorer.log")
    done = [0] * CLIENTS
    samples: list[tuple[float, float]] = []

    async def run() -> None:
        processes = [scorer.process.pid, *scorer.worker_pids(), *scorer.worker_pids("Nli")]
        assert len(processes) == 3
        started = time.monotonic()

        async def use(index: int) -> None:
            async with ScoringClient(scorer.url, timeout_s=120) as client:
                while time.monotonic() - started < SECONDS:
                    await requests[index][done[index] % 4].check(client)
                    done[index] += 1

        async def sample() -> None:
            while True:
                samples.append((time.monotonic() - started, memory_mb(processes)))
                await asyncio.sleep(0.5)

        sampling = asyncio.create_task(sample())
        await asyncio.gather(*(use(index) for index in range(CLIENTS)))
        sampling.cancel()

    try:
        scorer.wait_healthy(180)
        caplog.set_level(logging.WARNING)
        asyncio.run(run())
    finally:
        code = scorer.stop()
    retries = sum(" failed: " in record.getMessage() for record in caplog.records)
    early = max(mb for seconds, mb in samples if seconds <= SECONDS / 3)
    late = max(mb for seconds, mb in samples if seconds > SECONDS / 3)
    print(
        f"{sum(done)} requests in {SECONDS:g} s, {sum(done) / SECONDS:.0f} a second, {min(done)} to {max(done)} of a "
        f"client, {retries} attempts again, memory {samples[0][1]:.0f} MB, then up to {early:.0f} and {late:.0f} MB"
    )
    assert code == 0
    assert min(done) >= 4  # every client has had each of its answers
    assert late - early < GROWTH_MB
    log = scorer.log.read_text()
    assert log.count("' 200 ") == sum(done)
    assert " died" not in log and "Traceback" not in log
