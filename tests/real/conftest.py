"""SmolLM2-135M-Instruct, prepared once and kept in pytest's cache: half a gigabyte that all sessions share."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from real_model import VERSION, package_folder, prepare


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """Model folder in float32. Only to be read."""
    try:
        package_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = Path(request.config.cache.mkdir("smollm2"))
    # Workers side by side want it at the same time.
    with FileLock(folder / "lock"):
        prepare(folder / f"model-{VERSION}")
    return folder / f"model-{VERSION}"


@pytest.fixture(scope="session")
def small_llama(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of SmolLM2 on a random model of two small layers, for what needs its tokens and not its words."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    config = AutoConfig.from_pretrained(smollm2, num_attention_heads=2, num_key_value_heads=1, **sizes)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small") / "llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder
