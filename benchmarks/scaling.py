"""Memory and seconds of a training step on GPUs, on paper: token counts of the method and published rates of a device.

    python benchmarks/scaling.py [--write]     # --write: into docs/scaling.md

Nothing here was measured on a GPU. The tokens of the scorer are counted by the engine's own prefix tree on rollouts of
the assumed lengths; all else is arithmetic that docs/scaling.md spells out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from verl.utils.siop.scorer.engines.base import EngineInfo, Probe, RolloutQuery  # noqa: E402
from verl.utils.siop.scorer.engines.prefix_tree import build_prefix_tree  # noqa: E402
from verl.utils.siop.scorer.engines.token_paths import TOKEN_BYTES, ScoredPath, score_request  # noqa: E402

DOCS = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- benchmarks/scaling.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Model:
    """A decoder with grouped-query attention, from its published configuration."""

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes(self) -> float:
        """Of one token in bfloat16: keys and values of all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def flops(self, tokens: float, context: float) -> float:
        """Of a forward pass: 2 a parameter, and attention of each token to ``context`` tokens."""
        return tokens * (2 * self.parameters + 4 * self.layers * self.hidden * context)


@dataclass(frozen=True)
class Device:
    """Published rates of one accelerator, and the shares of them that are assumed to be reached."""

    name: str = "H100 SXM"
    memory_gb: float = 80.0
    flops: float = 989e12  # bfloat16, dense
    bytes_a_second: float = 3.35e12
    compute_share: float = 0.4
    bandwidth_share: float = 0.6


@dataclass(frozen=True)
class Setting:
    """One step: questions, rollouts of each, and mean lengths in tokens."""

    questions: int = 128
    rollouts: int = 8
    turns: int = 5
    prompt: int = 700
    turn: int = 220
    observation: int = 500
    references: int = 3
    probe: int = 15  # opening, prefix and reference

    @property
    def sequences(self) -> int:
        return self.questions * self.rollouts

    @property
    def response(self) -> int:
        return self.turns * self.turn + (self.turns - 1) * self.observation

    @property
    def length(self) -> int:
        return self.prompt + self.response


QWEN3 = (
    Model("Qwen3-4B", 4.02e9, 36, 2560, 8, 128),
    Model("Qwen3-8B", 8.19e9, 36, 4096, 8, 128),
)
# GPUs of training and rollouts, of the scorer, and of the retriever (0: it runs on CPUs).
LAYOUTS = ((6, 1, 1), (6, 2, 0), (12, 3, 1), (50, 12, 2))


@cache
def scorer_tokens(setting: Setting) -> tuple[int, int]:
    """Tokens of a question's support: those that go through the model, and those of all as full sequences."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return rng.integers(0, 150_000, count)

    prompt, period = draw(setting.prompt), setting.turn + setting.observation
    probes = [Probe(draw(setting.probe), 0, setting.probe) for _ in range(setting.references)]
    ends = [0, *(setting.turn + period * turn for turn in range(setting.turns - 1)), period * (setting.turns - 1)]
    rollouts = [RolloutQuery(prompt, draw(setting.response), ends, probes) for _ in range(setting.rollouts)]

    def count(paths: list[ScoredPath]) -> tuple[np.ndarray, int]:
        nodes = build_prefix_tree([path.tokens[:-TOKEN_BYTES] for path in paths], [np.empty(0, np.int64)] * len(paths))
        return np.zeros(len(paths)), len(nodes)

    result = score_request(rollouts, EngineInfo("count", "none", 10**6, 150_000), count)
    return result.computed_tokens, result.requested_tokens


def step(model: Model, device: Device, setting: Setting, training: int, scoring: int) -> dict[str, float]:
    """Seconds of the parts of a step, and GB a GPU; see docs/scaling.md for each formula."""
    compute, bandwidth = device.flops * device.compute_share, device.bytes_a_second * device.bandwidth_share
    mean_context = setting.length / 2
    forward = model.flops(setting.sequences * setting.length, mean_context) / (compute * training)

    free_gb = device.memory_gb * 0.5 - 2 * model.parameters / 1e9
    at_once = min(setting.sequences / training, free_gb * 1e9 / (model.kv_bytes * setting.length))
    # One decoding step reads the weights once and the keys and values of all sequences.
    decoding_step = (2 * model.parameters + at_once * model.kv_bytes * mean_context) / bandwidth
    generated = setting.sequences * setting.turns * setting.turn
    decoding = generated / training / at_once * decoding_step
    read = setting.questions * setting.prompt + setting.sequences * (setting.turns - 1) * setting.observation
    prefill = model.flops(read, mean_context) / (compute * training)

    tree, _ = scorer_tokens(setting)
    support = model.flops(setting.questions * tree, mean_context) / (compute * scoring)
    return {
        "decoding": decoding,
        "prefill": prefill,
        "log-probs": 2 * forward,  # of the policy and of the reference model
        "update": 4 * forward,  # with gradient checkpointing: forward twice, backward twice as much
        "support": support,
        "step": decoding + prefill + 6 * forward + max(0.0, support - 0.9 * (decoding + prefill)),
        "train GB": 16 * model.parameters / training / 1e9 + 2 * model.parameters / 1e9,
        "scorer GB": 2 * model.parameters / 1e9 + setting.rollouts * setting.length * model.kv_bytes / 1e9,
    }


def table() -> str:
    """The table of the page, in Markdown."""
    setting, device = Setting(), Device()
    tree, full = scorer_tokens(setting)
    lines = [
        f"{setting.questions} questions × {setting.rollouts} rollouts, {setting.turns} turns, mean "
        f"{setting.length:,} tokens; {device.name}. Support of a question: {tree:,} tokens through the model, "
        f"{full:,} as full sequences ({full / tree:.1f} times as many).",
        "",
        "| model | GPUs: train + rollout, scorer, retriever | decoding | prefill | log-probs | update | support | step "
        "| training state | scorer |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model in QWEN3:
        for training, scoring, retrieving in LAYOUTS:
            found = step(model, device, setting, training, scoring)
            seconds = " | ".join(
                f"{found[key]:.1f} s" for key in ("decoding", "prefill", "log-probs", "update", "support", "step")
            )
            lines.append(
                f"| {model.name} | {training}, {scoring}, {retrieving} | {seconds} | "
                f"{found['train GB']:.0f} GB a GPU | {found['scorer GB']:.0f} GB a GPU |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/scaling.md")
    args = parser.parse_args()
    text = table()
    print(text)
    if args.write:
        page = DOCS.read_text()
        head, _, rest = page.partition(BEGIN)
        DOCS.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
