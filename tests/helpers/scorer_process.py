"""Tiny random models, and a scorer process over them, for the tests of the scorer."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
BYTE_TOKENIZER = ROOT / "tests" / "golden" / "byte_tokenizer"
VOCAB_SIZE = 320
MAX_MODEL_LEN = 128


def tiny_causal_lm(seed: int = 0, **overrides):
    """Random Qwen3 with weights large enough that different contexts give clearly different scores."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": MAX_MODEL_LEN,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**options, **overrides})).float().eval()


def save_causal_lm(path: Path, seed: int = 0, **overrides) -> Path:
    """Save :func:`tiny_causal_lm` with the byte tokenizer."""
    from transformers import AutoTokenizer

    tiny_causal_lm(seed, **overrides).save_pretrained(path)
    AutoTokenizer.from_pretrained(BYTE_TOKENIZER).save_pretrained(path)
    return path


def tiny_classifier(labels: tuple[str, ...], seed: int = 0, max_len: int = 96):
    """Random BERT sequence classifier whose labels are ``labels`` in this order."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_len,
        initializer_range=0.3,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        pad_token_id=0,
    )
    return BertForSequenceClassification(config).eval()


def pair_tokenizer():
    """The byte tokenizer: pairs are the concatenation of both texts, one token per byte."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BYTE_TOKENIZER)


def teach_self_test(model):
    """Shift the head of a classifier just so far that it passes the NLI self-test."""
    import torch
    from verl.utils.siop.scorer.engines.nli import SELF_TEST

    labels = [label.lower() for label in model.config.id2label.values()]
    tokenizer = pair_tokenizer()
    with torch.inference_mode():
        pooled = [model.bert(**tokenizer(a, b, return_tensors="pt")).pooler_output[0] for a, b, _ in SELF_TEST]
    pooled_PD = torch.stack(pooled).clone()
    wanted_PC = torch.zeros(len(SELF_TEST), len(labels))
    for row, (_, _, expected) in zip(wanted_PC, SELF_TEST, strict=True):
        row[[(label == "entailment") == (expected == "entailment") for label in labels].index(True)] = 2.0
    with torch.no_grad():
        missing_PC = wanted_PC - model.classifier(pooled_PD)
        model.classifier.weight += (torch.linalg.pinv(pooled_PD) @ missing_PC).T
    return model


def save_classifier(
    path: Path,
    labels: tuple[str, ...] = ("contradiction", "neutral", "entailment"),
    self_test: bool = True,
    **options,
) -> Path:
    """Save :func:`tiny_classifier`, by default one that passes the self-test, with its tokenizer."""
    model = tiny_classifier(labels, **options)
    (teach_self_test(model) if self_test else model).save_pretrained(path)
    pair_tokenizer().save_pretrained(path)
    return path


def free_port() -> int:
    """A TCP port that nobody listens on.

    Below those that the system gives to connections: one of them may be taken again before a slow start binds it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def eventually(condition, timeout_s: float = 60.0):
    """Poll until ``condition()`` is true; returns its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not so after {timeout_s} s"
        time.sleep(0.02)
    return value


def scorer_env(**extra: str) -> dict[str, str]:
    """Environment of a scorer process: one thread, no outer Ray, no proxy, this checkout first."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "SIOP_API_TOKEN") and "proxy" not in k.lower()
    }
    return {**env, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **extra}


class ScorerProcess:
    """A real scoring server in its own session.

    Args:
        arguments: command line after ``python -m verl.utils.siop.scoring_server``; ``--port`` is added.
        log: file for its output.
        env: added to :func:`scorer_env`.
        port: default: a free one.
    """

    def __init__(
        self, arguments: list[str], log: Path, env: dict[str, str] | None = None, port: int | None = None
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "verl.utils.siop.scoring_server", "--threads", "1", *arguments]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=ROOT,
                env=scorer_env(**(env or {})),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_healthy(self, timeout_s: float = 180.0) -> dict:
        """Wait for 200 from /health and return its JSON."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the scorer exited with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                response = httpx.get(f"{self.url}/health", timeout=5)
            except httpx.TransportError:
                response = None
            if response is not None and response.status_code == 200:
                return response.json()
            time.sleep(0.1)
        raise AssertionError(f"the scorer was not healthy after {timeout_s} s:\n{self.log.read_text()}")

    def members(self) -> list[int]:
        """Living processes of the server's session, the server among them."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def worker_pids(self, kind: str = "Scoring") -> list[int]:
        """Processes that hold the models of this kind, ``Scoring`` or ``Nli``."""
        pids = []
        for pid in self.members():
            with contextlib.suppress(OSError):
                if f"ray::{kind}Worker" in Path(f"/proc/{pid}/cmdline").read_text():
                    pids.append(pid)
        return pids

    def stop(self) -> int:
        """SIGTERM the server, assert that its whole session ends, and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            code = self.process.wait(60)
            # Workers that Ray was just starting notice only then that they are alone.
            deadline = time.monotonic() + 60
            while self.members() and time.monotonic() < deadline:
                time.sleep(0.1)
            left = self.members()
        finally:
            self.kill()
        assert not left, f"processes were left running: {left}"
        return code

    def kill(self) -> None:
        """SIGKILL the server and whatever is left of its session."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
