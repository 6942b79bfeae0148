"""How fast and how exact the scorer is on a GPU, in under eight minutes of it.

    python benchmarks/gpu_check.py [--out runs/gpu_check.json]      on the first GPU
    python benchmarks/gpu_check.py --dry-run                        the same stages on a CPU, with tiny sizes

Needs this repository, torch and transformers; no model, no network, no flash-attn, and verl need not be installed. All
weights and token ids are random. The stages:

    matmul     the rate of a large matrix product: the limit
    speed      8 rollouts of 4,000 to 8,000 tokens through the scorer's engine with Qwen3-4B's shape in bfloat16: the
               prefix tree against one full sequence per (boundary, reference)
    precision  scores in bfloat16 and float32; noise: how much they depend on what else is in the request
    mask       attention over the tree: the engine's dense masks against FlexAttention with a block mask
    nli        pairs a second of a DeBERTa-large in float16

Each stage is a process of its own, so that one that fails, hangs or runs out of memory costs its own numbers only; what
was found until then is kept. The file is written after every stage. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import platform
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BUDGET_S = 470.0
NAMES = ("matmul", "speed", "precision", "mask", "nli")
_HEARTBEAT_S = 10.0
_LEAST_S = 10.0  # a stage does not start with less


class PipeReport:
    """A stage's report (:class:`gpu_stages.Report`), sent to the parent."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def say(self, text: str) -> None:
        self._pipe.send(("say", text))

    def number(self, key: str, value: Any) -> None:
        self._pipe.send(("number", (key, value)))

    def row(self, what: str, seconds: float, items: int, flop: float, gib: float | None, unit: str = "tokens") -> None:
        row = {"what": what, "seconds": seconds, "items": items, "unit": unit, "flop": flop, "gib": gib}
        self._pipe.send(("row", row))

    def left_out(self, text: str) -> None:
        self._pipe.send(("left_out", text))


def run_stage(name: str, dry_run: bool, deadline: float, pipe: Connection) -> None:
    """A stage, in its process."""
    try:
        from benchmarks.gpu_stages import STAGES, NotEnoughMemory, Setup

        report = PipeReport(pipe)
        try:
            STAGES[name][0](Setup(dry_run, deadline), report)
        except NotEnoughMemory as error:
            report.left_out(f"all of it: {error}")
        pipe.send(("done", None))
    except Exception as error:  # noqa: BLE001  (reported by the parent, which goes on with the next stage)
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


class Check:
    """Runs the stages and keeps what they find.

    Args:
        dry_run: tiny sizes on a CPU.
        out: the JSON file.
        budget_s: seconds for all stages.
    """

    def __init__(self, dry_run: bool, out: Path, budget_s: float = BUDGET_S) -> None:
        self._dry_run, self._out, self._end = dry_run, out, time.time() + budget_s
        self.found: dict[str, Any] = {
            "device": "CPU, a dry run: its numbers mean nothing" if dry_run else "unknown",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
            "stages": {},
            "failed": {},
        }

    def say(self, text: str) -> None:
        print(f"[{max(0.0, self._end - time.time()):3.0f} s left] {text}", flush=True)

    def run(self, name: str, longest_s: float) -> None:
        """One stage, to its end or its limit; its findings are in ``found`` and in the file."""
        stage: dict[str, Any] = {"rows": [], "left_out": []}
        self.found["stages"][name] = stage
        limit = min(longest_s, self._end - time.time())
        started = time.monotonic()
        if limit < _LEAST_S:
            self._fail(name, "no time was left")
        else:
            self.say(name)
            failure = self._watch(name, stage, limit)
            if failure:
                self._fail(name, failure)
        stage["took_s"] = round(time.monotonic() - started, 1)
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def _fail(self, name: str, reason: str) -> None:
        self.found["failed"][name] = reason
        self.say(f"{name} failed: {reason}")

    def _watch(self, name: str, stage: dict[str, Any], limit: float) -> str | None:
        """Why the stage failed; None if it did not."""
        context = multiprocessing.get_context("spawn")  # a fork would share CUDA's state
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=run_stage, args=(name, self._dry_run, time.time() + limit, theirs))
        process.start()
        theirs.close()
        end, last = time.monotonic() + limit, ""
        try:
            while (left := end - time.monotonic()) > 0:
                if not ours.poll(min(_HEARTBEAT_S, left)):
                    self.say(f"  {name} goes on{last and f': {last}'}")
                    continue
                kind, what = ours.recv()
                if kind in ("done", "failed"):
                    return what
                if kind == "say":
                    last = what
                    self.say(f"  {what}")
                self._keep(kind, what, stage)
            return f"it took longer than {limit:g} s"
        except EOFError:
            process.join()
            return f"its process ended with status {process.exitcode}"
        finally:
            process.kill()
            process.join()

    def _keep(self, kind: str, what: Any, stage: dict[str, Any]) -> None:
        if kind == "number":
            key, value = what
            (self.found if key == "device" else stage)[key] = value
        elif kind == "row":
            stage["rows"].append(what)
        elif kind == "left_out":
            stage["left_out"].append(what)
            self.say(f"  left out: {what}")


# Findings beside the rows: what they mean.
NUMBERS = {
    "speed": {
        "speedup": "the tree is {:.1f} times as fast as full sequences",
        "difference_bfloat16": "scores of tree and full sequences, bfloat16, differ by {}",
    },
    "precision": {
        "difference_bfloat16": "the same for the answers at the end, bfloat16: {}",
        "difference_float32": "float32: {}",
        "difference_of_types_tree": "bfloat16 and float32 differ by {} with the tree",
        "difference_of_types_full": "{} with full sequences",
        "noise_bfloat16": "noise in bfloat16 {:.1e}, as a training measures it at its start (siop_scorer_noise)",
        "noise_long_bfloat16": "{:.1e} with whole rollouts",
        "noise_float32": "noise in float32 {:.1e}",
        "noise_long_float32": "{:.1e} with whole rollouts",
    },
    "mask": {
        "blocks_seen": "FlexAttention computes {:.1%} of the blocks of 128 x 128",
        "flex_difference": "its output and that with dense masks differ by {:.1e} at most",
    },
}


def table(found: dict[str, Any]) -> str:
    """The findings as text for benchmarks/README.md."""
    stages = found["stages"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"{found['device']}; {versions}", ""]
    lines.append(f"{'':40}{'':>16}{'seconds':>10}{'a second':>12}{'TFLOP/s':>9}{'of limit':>10}{'GiB':>7}")
    limits = {name: stages.get("matmul", {}).get(f"limit_{name}") for name in ("bfloat16", "float32")}
    for stage in stages.values():
        for row in stage["rows"]:
            rate, limit = row["flop"] / row["seconds"], limits["float32" if "float32" in row["what"] else "bfloat16"]
            lines.append(
                f"{row['what']:40}{row['items']:9,} {row['unit']:6}{row['seconds']:10.4f}"
                f"{row['items'] / row['seconds']:12,.0f}{rate / 1e12:9.1f}"
                f"{format(rate / limit, '10.0%') if limit else '':10}{row['gib'] or '':>7}".rstrip()
            )
    lines.append("")
    for name, stage in stages.items():
        for key, text in NUMBERS.get(name, {}).items():
            value = stage.get(key)
            if isinstance(value, dict):
                value = f"at most {value['max']:.1e}, root mean square {value['rms']:.1e}"
            lines += [text.format(value)] if value is not None else []
        lines += [f"{name} left out {text}" for text in stage["left_out"]]
    dense, tree = stages.get("mask", {}).get("dense_seconds"), stages.get("speed", {}).get("tree_seconds")
    if dense and tree:
        share = stages["speed"]["layers"] * dense / tree
        lines.append(f"attention with dense masks takes about {share:.0%} of the tree's time")
    lines += [f"{name} FAILED: {reason}" for name, reason in found["failed"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check.json", help="what was found")
    parser.add_argument("--stages", nargs="+", choices=NAMES, default=NAMES, metavar="STAGE", help=", ".join(NAMES))
    args = parser.parse_args(argv)

    import torch

    from benchmarks.gpu_stages import STAGES

    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --dry-run runs on a CPU")
    check = Check(args.dry_run, args.out)
    for name in args.stages:
        check.run(name, STAGES[name][1])
    print(f"\n{table(check.found)}\n\n{args.out}")
    return 1 if check.found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
