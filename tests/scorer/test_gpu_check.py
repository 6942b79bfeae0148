"""benchmarks/gpu_check.py where only torch and transformers are installed: all stages, and stages that fail."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from verl.utils.siop.scorer.engines.prefix_tree import build_prefix_tree
from verl.utils.siop.scorer.engines.token_paths import encode_path

from benchmarks import gpu_check
from benchmarks.gpu_stages import BLOCK, STAGES, block_mask, dense_attention

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python (``-S``) that has torch, transformers, what they require, and nothing else."""
    site, found, names = tmp_path_factory.mktemp("site"), {}, ["torch", "transformers"]
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        found[name] = distribution = importlib.metadata.distribution(name)
        required = map(Requirement, distribution.requires or ())
        names += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = site / top
            if not link.is_symlink():  # namespace packages have several owners
                link.symlink_to(Path(str(distribution.locate_file(top))))
    assert not found.keys() & {"verl", "siop-verl", "ray", "fastapi", "cachetools", "flash-attn"}
    return {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(site)}


def test_every_stage_runs_without_verl(bare: dict[str, str], tmp_path: Path) -> None:
    import_verl = "import verl; print(len(list(verl.__path__)), hasattr(verl, 'DataProto'))"  # the overlay alone
    seen = subprocess.run(
        [sys.executable, "-S", "-c", import_verl], cwd=ROOT, env=bare, capture_output=True, text=True, check=True
    )
    assert seen.stdout.split() == ["1", "False"]

    out = tmp_path / "found.json"
    command = [sys.executable, "-S", str(SCRIPT), "--dry-run", "--out", str(out)]
    run = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(out.read_text())
    assert list(found["stages"]) == list(STAGES) == list(gpu_check.NAMES) and found["failed"] == {}
    assert all(stage["rows"] and not stage["left_out"] for stage in found["stages"].values())
    speed, precision, mask = (found["stages"][name] for name in ("speed", "precision", "mask"))
    tree, full = speed["rows"][0], speed["rows"][-1]
    assert full["items"] > 10 * tree["items"] and full["flop"] > 10 * tree["flop"]
    assert 0 < speed["difference_bfloat16"]["max"] < 0.1
    assert 0 < precision["difference_float32"]["max"] < 1e-5 < precision["difference_of_types_tree"]["max"]
    assert 0 < precision["noise_float32"] < 1e-5 < precision["noise_bfloat16"] < 0.1
    assert mask["flex_difference"] < 0.05 and 0 < mask["blocks_seen"] < 1

    assert "s left] speed" in run.stdout and "a dry run" in run.stdout
    for texts in gpu_check.NUMBERS.values():  # every finding has its line
        for text in texts.values():
            assert text.partition("{")[0].strip() in run.stdout and text.partition("}")[2] in run.stdout
    for stage in found["stages"].values():
        assert all(row["what"] in run.stdout for row in stage["rows"])


def test_without_a_gpu_it_says_so(bare: dict[str, str]) -> None:
    env = {**bare, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-S", str(SCRIPT)], env=env, capture_output=True, text=True)
    assert run.returncode == 2 and "no CUDA device; --dry-run" in run.stderr


def test_a_stage_that_fails_costs_its_own_numbers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "found.json"
    check = gpu_check.Check(dry_run=True, out=out)
    check.run("unknown", 60)
    monkeypatch.setattr(gpu_check, "_LEAST_S", 0.0)
    check.run("speed", 0.2)
    monkeypatch.setattr(gpu_check, "_LEAST_S", 1e9)
    check.run("nli", 60)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "_LEAST_S", 0.0)
        patch.setattr(gpu_check, "run_stage", os._exit)  # takes no such arguments: the process dies without a word
        check.run("mask", 60)
    found = json.loads(out.read_text())
    assert found["failed"] == {
        "unknown": "KeyError: 'unknown'",
        "speed": "it took longer than 0.2 s",
        "nli": "no time was left",
        "mask": "its process ended with status 1",
    }
    assert "mask FAILED: its process ended" in gpu_check.table(found)
    assert "s left] speed failed: it took" in capsys.readouterr().out


def test_exit_status_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "BUDGET_S", 0.0)
    monkeypatch.setattr(gpu_check.Check.__init__, "__defaults__", (0.0,))
    assert gpu_check.main(["--dry-run", "--stages", "nli", "--out", str(tmp_path / "found.json")]) == 1


def _random_tree(rng: np.random.Generator, nodes: int) -> Any:
    """A packed tree of at least so many nodes, whose branches part at random places."""
    paths: list[np.ndarray] = [rng.integers(0, 9, 200)]
    size = 200
    while size < nodes:
        parent = paths[rng.integers(len(paths))]
        shared, new = int(rng.integers(len(parent))), rng.integers(9, 99, int(rng.integers(1, 200)))
        paths.append(np.concatenate([parent[:shared], new]))
        size += len(new)
    return build_prefix_tree([encode_path(path) for path in paths], [np.empty(0, dtype=np.int64)] * len(paths))


@pytest.mark.parametrize("seed", range(5))
def test_block_mask_and_dense_attention_are_the_trees(seed: int) -> None:
    rng = np.random.default_rng(seed)
    end = torch.from_numpy(_random_tree(rng, 1200).end[: 9 * BLOCK])
    nodes = torch.arange(len(end))
    visible = (nodes[None] <= nodes[:, None]) & (nodes[:, None] < end[None])

    mask = block_mask(end)
    blocks = visible.view(9, BLOCK, 9, BLOCK).transpose(1, 2)
    some, every = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    listed = torch.zeros(2, 9, 9, dtype=torch.bool)
    kinds = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for kind, (counts, indices) in enumerate(kinds):
        for row in range(9):
            listed[kind, row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
    assert torch.equal(listed.any(0), some) and torch.equal(listed[1], every)

    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, heads, len(end), 16) for heads in (4, 2, 2))
    keys, values = (part.repeat_interleave(2, 1) for part in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
    torch.testing.assert_close(dense_attention(query, key, value, end, 100), expected)
