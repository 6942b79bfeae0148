"""bash doctor.sh: a line for each check, also after a failure; exit code 0 only if a run would start."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_retriever import FakeRetriever
from launching import bash
from preflight_world import SEARCH_TOOL, Parts, changed, health_of_scorer, right_parts, write_tools
from scorer_process import ScorerProcess, free_port
from verl.trainer.siop import doctor
from verl.trainer.siop.checks import machine
from verl.trainer.siop.doctor import Finding, examine, main

from examples.toy_world import build

CHECKS = [name for name, _ in doctor.ALL_CHECKS]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The doctor silences the logs of its process, which here is that of the tests."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def parts(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    # The plugin has registered what belongs to this process's platform, before the line above.
    monkeypatch.setattr(machine, "check_plugin", lambda config: "registered")
    return {**right_parts(tmp_path, tiny_model), "actor_rollout_ref.actor.ppo_mini_batch_size": "2"}


def _findings(parts: Parts, **changes: Any) -> tuple[bool, dict[str, Finding]]:
    found: list[Finding] = []
    values = {key.replace("__", "."): str(value) for key, value in changes.items()}
    starts = examine(changed({**parts, **values}), found.append)
    assert [finding.name for finding in found] == CHECKS
    return starts, {finding.name: finding for finding in found}


def test_a_run_without_services_would_start_where_none_is_needed(parts: Parts) -> None:
    starts, found = _findings(parts, algorithm__adv_estimator="grpo")
    assert starts and not any(finding.failed for finding in found.values())
    assert found["scorer"].text == "not needed" and found["search"].text == "no tools"
    assert re.search(r"verl 0\.9\.1.*TransferQueue", found["Python and packages"].text)
    assert found["data rows"].text.startswith("data.train_files 3 rows, 3 with a label")


def test_all_checks_are_made_also_after_failures(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    starts, found = _findings(
        parts,
        data__train_files="nowhere.parquet",
        algorithm__siop_lambda=2,
        trainer__default_local_dir=tmp_path / "file" / "out",
        actor_rollout_ref__actor__use_dynamic_bsz="false",
    )
    assert not starts
    failed = {name for name, finding in found.items() if finding.failed}
    assert failed == {"disk", "settings", "data files", "round trips", "data rows", "verl", "scorer"}
    assert "siop_lambda=2 is not allowed" in found["settings"].text
    assert found["data files"].text == "data.train_files=nowhere.parquet: no such file"
    assert found["data rows"].text.startswith("not checked, for it needs what failed above (")
    assert "cannot be written" in found["disk"].text
    assert "ppo_micro_batch_size" in found["verl"].text


def test_services_are_asked_also_where_model_and_data_are_wrong(parts: Parts, tmp_path: Path) -> None:
    with FakeRetriever() as retriever, health_of_scorer(engine="vllm", model="m", nli="org/deberta") as url:
        tool = {**SEARCH_TOOL, "config": {**SEARCH_TOOL["config"], "retrieval_service_url": retriever.url}}
        starts, found = _findings(
            parts,
            data__train_files="nowhere.parquet",
            actor_rollout_ref__model__path=tmp_path / "nowhere",
            actor_rollout_ref__rollout__multi_turn__tool_config_path=write_tools(tmp_path / "search.yaml", tool),
            algorithm__siop_scorer_url=url,
        )
    assert not starts and {"model and tools", "data files"} <= {name for name in found if found[name].failed}
    assert found["scorer"].text == f"{url}: m (vllm), NLI org/deberta" and not found["scorer"].failed
    assert found["scorer"].warnings == ["not compared with the policy's tokenizer, for there is no policy"]
    assert not found["search"].failed and "1 passages for 'who ?'" in found["search"].text


def test_settings_are_all_told_at_once(parts: Parts) -> None:
    _, found = _findings(
        {**parts, "actor_rollout_ref.model.path": "~/models/deepseek-llm-7b-chat"},
        trainer__device="cuda",
        algorithm__siop_lambda=2,
    )
    for part in ("model.path is not set", "trainer.device=cuda but VERL_PLATFORM", "siop_lambda=2 is not allowed"):
        assert found["settings"].text.count(part) == 1


def test_an_output_folder_in_use_is_told(parts: Parts) -> None:
    folder = Path(parts["trainer.default_local_dir"])
    code = "import sys, pathlib, time; from verl.trainer.siop.run.lock import output_lock\n"
    code += "with output_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        while "held" not in holder.stdout.readline():
            assert holder.poll() is None
        starts, found = _findings(parts, algorithm__adv_estimator="grpo")
        holder.kill()
    assert not starts and f"the output folder of another run: process {holder.pid} on " in found["output folder"].text
    assert _findings(parts, algorithm__adv_estimator="grpo")[0]


def test_after_a_wrong_type_nothing_is_reported_that_only_calculates_with_it(parts: Parts) -> None:
    starts, found = _findings(parts, algorithm__adv_estimator="grpo", data__train_batch_size="abc")
    assert not starts
    assert found["keys and values"].text == "data.train_batch_size=abc is not allowed: needs a whole number"
    others = {finding.text for finding in found.values() if finding.failed} - {found["keys and values"].text}
    assert others == {"not checked, for it needs what failed above (keys and values)"}


def test_a_check_that_hangs_is_left(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECK_WAIT_S", 0.5)

    def sleep(run: Any) -> str:
        time.sleep(60)
        return ""

    monkeypatch.setattr(doctor, "ALL_CHECKS", (("sleeper", sleep), ("next", lambda run: "fine")))
    found: list[Finding] = []
    assert not examine(changed(parts), found.append)
    assert [finding.lines() for finding in found] == [["failed   sleeper: no end after 0.5 s"], ["ok       next: fine"]]


def test_warnings_stand_by_their_check(parts: Parts) -> None:
    _, found = _findings(parts, algorithm__adv_estimator="grpo")
    lines = found["data rows"].lines()
    assert lines[0].startswith("ok       data rows: ")
    assert lines[1].startswith("warning  data rows: the prompt does not say that the answer goes into <answer>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm.siop_lamda=0.3"], "did you mean siop_lambda"),
        (["data.nothing=1"], "data.nothing"),
        (["experiment=toi", "--config-dir", "config"], "toi"),
    ],
)
def test_arguments_that_make_no_configuration(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("failed   configuration: ") and message in line


def test_missing_keys_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    starts, found = _findings({"data.train_batch_size": "2"})
    assert not starts
    assert "actor_rollout_ref.model.path is not set; give it a value (MODEL_PATH" in found["settings"].text


# --- the machine ------------------------------------------------------------------------------------------------------


def _on_gpus(parts: Parts, monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[int, int, int]], **changes: Any) -> str:
    monkeypatch.setattr(machine, "_gpus", lambda: gpus)
    config = changed({**parts, "trainer.device": "cuda", **{key.replace("__", "."): x for key, x in changes.items()}})
    return machine.check_gpus(config, lambda text: None)


def test_gpus(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    with pytest.raises(machine.MachineError, match=r"torch .* is a CPU build, and this machine has 1 GPU"):
        _on_gpus(parts, monkeypatch, [(0, 80 * gib, 80 * gib)])
    monkeypatch.setattr("torch.version.cuda", "12.8")
    both = [(0, 70 * gib, 80 * gib), (1, 30 * gib, 80 * gib)]
    assert _on_gpus(parts, monkeypatch, both) == "1 used, 70 of 80 GiB free, 30 of 80 GiB free"
    with pytest.raises(machine.MachineError, match=r"GPU 1 has 30 of 80 GiB free, .* asks for 40 .*ROLLOUT_GPU_M"):
        _on_gpus(parts, monkeypatch, both, trainer__n_gpus_per_node="2")
    with pytest.raises(machine.MachineError, match=r"n_gpus_per_node=4 .*, but 2 GPU\(s\) can be seen"):
        _on_gpus(parts, monkeypatch, both, trainer__n_gpus_per_node="4")
    warned: list[str] = []
    machine.check_gpus(changed(parts), warned.append)
    assert "2 GPU(s) here, but trainer.device=cpu" in warned[0]


def test_attention(parts: Parts) -> None:
    gpu = changed({**parts, "trainer.device": "cuda"})
    assert machine.check_attention(gpu) == "sdpa"
    gpu.actor_rollout_ref.model.override_config.attn_implementation = "flash_attention_2"
    with pytest.raises(machine.MachineError, match=r"flash-attn is not installed.*pip install flash-attn"):
        machine.check_attention(gpu)


def test_packages(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda name: ["verl==0.9.9", "nothing-at-all>=1"])
    with pytest.raises(machine.MachineError, match=r"verl 0.9.1, needs ==0.9.9; nothing-at-all missing, needs >=1"):
        machine.check_packages(changed(parts))


def test_ray_and_disk(parts: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(machine.MachineError, match=rf"address={address} \(RAY_ADDRESS\): no connection"):
        machine.check_ray(changed({**parts, "ray_kwargs.ray_init.address": address}), lambda text: None)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    warned: list[str] = []
    machine.check_ray(changed(parts), warned.append)
    assert "/dev/shm has 0.0 GiB free" in warned[0]
    with pytest.raises(machine.MachineError, match=r"one checkpoint takes about .*set OUTPUT_DIR"):
        machine.check_disk(changed({**parts, "trainer.default_local_dir": str(tmp_path)}), warned.append)


# --- the toy world ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world whose model has not learnt anything."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    steps = ["--copying-steps", "1", "--imperfect-steps", "1"]
    assert build.main(["--out", str(folder), "--train-questions", "60", "--eval-questions", "40", *steps]) == 0
    return folder


@pytest.fixture(scope="module")
def services(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    logs = tmp_path_factory.mktemp("logs")
    port = str(free_port())
    env = {"RETRIEVER_CORPUS_FILE": world / "corpus.jsonl", "RETRIEVER_PORT": port, "LOG_DIR": logs}
    scorer = ScorerProcess(["--model", str(world / "model")], logs / "scorer.log")
    try:
        started = bash("launch_retriever.sh", env=env)
        assert started.returncode == 0, started.stderr
        scorer.wait_healthy()
        yield {"RETRIEVER_URL": f"http://127.0.0.1:{port}/retrieve", "SIOP_SCORER_URL": scorer.url}
    finally:
        bash("launch_retriever.sh", "stop", env=env)
        scorer.stop()


def _doctor(world: Path, tmp_path: Path, *words: str, **env: str) -> tuple[int, list[str]]:
    done = bash(
        "doctor.sh", *words, env={"TOY_DIR": world, "OUTPUT_DIR": tmp_path / "out", "N_GPUS_PER_NODE": "0", **env}
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, [line for line in done.stdout.splitlines() if not line.startswith("[")]


def test_the_toy_world_with_its_services(world: Path, services: dict[str, str], tmp_path: Path) -> None:
    code, lines = _doctor(world, tmp_path, **services)
    assert code == 0 and lines[-1] == "a training run would start", lines
    assert [line.split(":")[0].split(None, 1)[1] for line in lines if line.startswith("ok")] == CHECKS
    text = "\n".join(lines)
    assert re.search(r"ok +scorer: http://.*; mean log-probability of a known text -\d+\.\d+", text)
    assert re.search(r"ok +search: search at http://.*: [1-9]\d* passages for 'w", text)
    assert re.search(r"warning +data rows: the prompt does not say how to call 'search'", text)


def test_the_toy_world_without_services(world: Path, tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    code, lines = _doctor(world, tmp_path, SIOP_SCORER_URL=nowhere, RETRIEVER_URL=f"{nowhere}/retrieve")
    assert code == 1 and lines[-1] == "a training run would not start"
    failed = [line for line in lines if line.startswith("failed")]
    assert [line.split(":")[0] for line in failed] == ["failed   scorer", "failed   search"]
    assert "bash launch_siop_scorer.sh" in failed[0] and "bash launch_retriever.sh" in failed[1]


def test_overrides_are_those_of_the_launcher(world: Path, services: dict[str, str], tmp_path: Path) -> None:
    code, lines = _doctor(world, tmp_path, "actor_rollout_ref.rollout.multi_turn.format=qwen3_coder", **services)
    assert code == 1
    (failed,) = [line for line in lines if line.startswith("failed")]
    assert "round trips" in failed and "set it to hermes" in failed


def test_help_and_wrong_variables() -> None:
    shown = bash("doctor.sh", "--help")
    assert shown.returncode == 0 and "TRAIN_FILE" in shown.stdout and "Starts nothing" in shown.stdout
    wrong = bash("doctor.sh", env={"ROLLOUT_N": "many"})
    assert wrong.returncode == 1 and "ROLLOUT_N=many is not allowed" in wrong.stderr
