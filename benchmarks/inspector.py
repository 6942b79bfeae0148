"""How long the page over rollouts takes to open, to search and to show a question, and its memory.

    python benchmarks/inspector.py [--steps 60 --rollouts 64] [--questions 40]
    python benchmarks/inspector.py --steps 1000 --rollouts 512          3 GB of disk, some minutes

Makes a dump (questions of 8 rollouts of 2 to 4 turns, 3 kB a rollout), starts the inspector as its user does, and asks
over HTTP as the page does. The baseline does without an index: it reads a whole dump for each answer, as a text viewer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
K = 8
WORDS = [f"word{number}" for number in range(2000)]


def rollout(step: int, group: int, session: int, rng: random.Random) -> dict[str, Any]:
    """One line of a dump."""
    turns = rng.randint(2, 4)
    spans: list[dict[str, Any]] = []
    output, token = "", 0

    def add(role: str, text: str) -> None:
        nonlocal output, token
        tokens = len(text) // 4
        spans.append({"role": role, "tokens": [token, token + tokens], "chars": [len(output), len(output) + len(text)]})
        output, token = output + text, token + tokens

    for turn in range(turns - 1):
        query = " ".join(rng.choices(WORDS, k=4))
        call = f'{{"name": "search", "arguments": {{"query": "{query}"}}}}'
        add("assistant", f"<think> look for {query} </think><tool_call> {call} </tool_call><|im_end|>")
        passages = " ".join(f"[{n}] {' '.join(rng.choices(WORDS, k=40))} ." for n in (1, 2))
        add("tool", f"<tool_response> {passages} </tool_response>{turn}")
    answer = f"answer {rng.randrange(4)}"
    add("assistant", f"<think> done </think><answer> {answer} </answer><|im_end|>")
    cluster, right = int(answer[-1]), float(answer == "answer 0")
    rewards = [rng.random() for _ in range(turns)]
    return {
        "input": "<|im_start|>user question<|im_end|>", "output": output, "gts": {"target": ["answer 0"]}, "step": step,
        "score": sum(rewards), "dump_version": 2, "uid": f"{step}-{group}_{session}_0", "group": f"{step}-{group}",
        "session": session, "method": "process", "settings": "none", "seed": 1, "answer": answer, "cluster": cluster,
        "question": f"what is {WORDS[(step * 7 + group) % len(WORDS)]} ?", "references": [answer], "mass": 0.25,
        "evidence": 0.5, "target": 0.25, "em": right, "f1": right, "spans": spans, "dropped": False,
        "support": [rng.random() for _ in range(turns + 1)], "boundaries": list(range(turns + 1)),
        "gains": rewards, "turn_rewards": rewards, "turn_returns": rewards,
        "turn_advantages": [rng.gauss(0, 1) for _ in range(turns)],
    }  # fmt: skip


def write_run(folder: Path, steps: int, rollouts: int) -> None:
    """A dump of ``steps`` with ``rollouts`` each; the texts of every step beyond 20 are those of one before."""
    (folder / "rollouts").mkdir(parents=True)
    texts: list[list[dict[str, Any]]] = []
    for step in tqdm(range(1, steps + 1), desc="making the dump", unit="step", disable=None, leave=False):
        if step <= 20:
            rng = random.Random(step)
            texts.append([rollout(step, row // K, row % K, rng) for row in range(rollouts)])
        with (folder / "rollouts" / f"{step}.jsonl").open("w") as file:
            for row, line in enumerate(texts[step % len(texts)]):
                group = f"{step}-{row // K}"
                named = {**line, "step": step, "group": group, "uid": f"{group}_{row % K}_0"}
                file.write(json.dumps(named) + "\n")


def baseline(folder: Path, step: int, group: str) -> Iterator[float]:
    """Seconds for a search through all files, and for a question out of its step's file, by JSON alone."""
    start = time.perf_counter()
    found = 0
    for path in (folder / "rollouts").glob("[0-9]*.jsonl"):
        with path.open() as file:
            found += sum(json.loads(line)["em"] == 0.0 for line in file)
    yield time.perf_counter() - start
    start = time.perf_counter()
    with (folder / "rollouts" / f"{step}.jsonl").open() as file:
        assert len([row for row in map(json.loads, file) if row["group"] == group]) == K
    yield time.perf_counter() - start


def start(folder: Path) -> tuple[subprocess.Popen[str], str, float]:
    """The inspector, its address, and the seconds from the command until the page answers."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "siop_inspector", str(folder), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    url = next(line.strip() for line in iter(process.stdout.readline, "") if line.startswith("http"))
    httpx.get(url, timeout=60).raise_for_status()
    return process, url, time.perf_counter() - began


def ask(client: httpx.Client, path: str, **values: Any) -> tuple[float, Any]:
    """Seconds, and the answer."""
    began = time.perf_counter()
    answer = client.get(f"/api/{path}", params={**client.params, **values})
    answer.raise_for_status()
    return time.perf_counter() - began, answer.json()


def until_read(client: httpx.Client, steps: int) -> float:
    """Seconds until all steps are in the index."""
    began = time.perf_counter()
    with tqdm(total=steps, desc="reading it", unit="step", disable=None, leave=False) as bar:
        while True:
            (state,) = ask(client, "runs")[1]["runs"]
            bar.update(state["steps"] - bar.n)
            if state["steps"] == steps:
                return time.perf_counter() - began
            time.sleep(0.05)


def measure(folder: Path, steps: int, count: int) -> None:
    """Print how long two starts take, and what the second can do."""
    for kind in ("first start", "later start"):
        process, url, launch = start(folder)
        try:
            with httpx.Client(base_url=url, timeout=600, params={"run": folder.name}) as client:
                read = until_read(client, steps)
                curves, _ = ask(client, "curves")
                page, found = ask(client, "questions", limit=100)
                print(f"{kind}: the page answers {launch:.2f} s after the command; then all steps {read:.2f} s,")
                whole = launch + read + curves + page
                print(f"    curves {curves:.3f} s, list {page:.3f} s: open {whole:.2f} s after it")
                if kind == "later start":
                    show_answers(client, folder, found["total"], count)
                    print(f"memory: {psutil.Process(process.pid).memory_info().rss / 1e6:.0f} MB")
        finally:
            process.terminate()
            process.wait(10)


def show_answers(client: httpx.Client, folder: Path, total: int, count: int) -> None:
    """A search, and questions at random places of the list."""
    search, _ = ask(client, "questions", text="word1", sort="advantage_min", outcome_to=0.2)
    rng, seconds = random.Random(0), []
    for _ in range(count):
        (one,) = ask(client, "questions", limit=1, offset=rng.randrange(total))[1]["questions"]
        seconds.append(ask(client, "question", step=one["step"], group=one["group"])[0])
    whole, single = baseline(folder, one["step"], one["group"])
    middle = statistics.median(seconds)
    print(f"search with three filters: {search:.3f} s; reading all files {whole:.2f} s, {whole / search:.0f} times")
    print(f"a question: median {middle:.3f} s, slowest of {count} {max(seconds):.3f} s; its step's file {single:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rollouts", type=int, default=64, help=f"of a step, a multiple of {K}")
    parser.add_argument("--questions", type=int, default=40, help="questions to open")
    args = parser.parse_args()
    if args.steps < 1 or args.questions < 1 or args.rollouts < K or args.rollouts % K:
        parser.error(f"--steps and --questions must be at least 1, --rollouts a multiple of {K}, got {vars(args)}")
    with tempfile.TemporaryDirectory(prefix="siop-inspector-") as name:
        folder = Path(name) / "run"
        write_run(folder, args.steps, args.rollouts)
        size = sum(path.stat().st_size for path in (folder / "rollouts").iterdir())
        print(f"{args.steps} steps of {args.rollouts} rollouts, {size / 1e6:.0f} MB")
        measure(folder, args.steps, args.questions)


if __name__ == "__main__":
    main()
