"""For all tests: their environment, the order of their files, and a tiny model with a chat template."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tiny_models import BYTE_TOKENIZER, tiny_causal_lm

# A busy machine is no failure: no deadline for an example, no limit to the time that drawing one takes.
settings.register_profile("siop", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("siop")

# Ignored in the background of a shell, and then in what the tests start, which may be sent one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Files that mostly wait or take long come first, so that the short ones fill up the time beside them.
LONG = (
    "test_end_to_end",
    "test_signals",
    "test_liveness",
    "test_several_nodes",
    "test_disk_full",
    "test_console",
    "test_release_commands",
    "test_data_to_table",
    "test_real_training",
    "test_gpu_check",
    "test_game_training",
    "test_load",
    "test_faults",
    "test_doctor",
    "test_page",
    "test_api_fuzz",
    "test_scorer_service",
    "test_policy_scorer",
    "test_real_benchmarks",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers with the byte tokenizer (259 tokens) and a chat template."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tiny_model")
    tokenizer = AutoTokenizer.from_pretrained(BYTE_TOKENIZER)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    model = tiny_causal_lm(
        vocab_size=264,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model.save_pretrained(path)
    return path
