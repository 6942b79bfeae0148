"""A disk that fills up while a training saves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from toy_training import ToyTraining, small_world

# In a mount namespace of its own, the output folder is a disk of 8 MB; what it held is copied out at the end.
SMALL_DISK = """\
mkdir -p "$1" && mount -t tmpfs -o size=8m tmpfs "$1"
out=$1
shift
"$@"
status=$?
cp -a "$out/." "$out.kept"
exit $status
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> bool:
    try:
        done = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, timeout=20)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces, to mount a small disk")
def test_the_last_good_checkpoint_is_left_and_gone_on_from(tmp_path: Path) -> None:
    world = small_world(tmp_path / "world")
    overrides = ("ablation=grpo", "algorithm.siop_on_nothing_learnt=warn", "trainer.save_freq=1")
    out = tmp_path / "out"
    within = [*NAMESPACE, "bash", "-c", SMALL_DISK, "small_disk", str(out)]
    training = ToyTraining(world, tmp_path, *overrides, "trainer.total_training_steps=9", within=within)
    try:
        assert training.wait(300) == 1, training.report()
        assert training.nothing_is_left()
    finally:
        training.kill()
    said = "\n".join(training.printed)
    assert f"error: the disk of {out} is full (" in said, training.report()
    kept = out.with_name("out.kept")
    step = int((kept / "latest_checkpointed_iteration.txt").read_text())
    assert step >= 1 and f"the last checkpoint is {out / f'global_step_{step}'}" in said

    out.rmdir()  # where the small disk was
    kept.rename(out)
    again = ToyTraining(world, tmp_path, *overrides, f"trainer.total_training_steps={step + 1}")
    try:
        assert again.wait(300) == 0, again.report()
    finally:
        again.kill()
    assert (out / f"global_step_{step + 1}" / "actor").is_dir()
    lines = (out / "rollouts" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 2))
