"""Options of the scorer's engines: how they reach the engine, and what wrong values are told."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from scoring_cases import CASES, MAX_MODEL_LEN, assert_agrees, case_model, plain_support, save_case_model
from tiny_models import save_causal_lm
from verl.utils.siop import scoring_server
from verl.utils.siop.errors import EngineFailed, SiopConfigError
from verl.utils.siop.scorer.engines.base import EngineInfo, SupportResult
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine
from verl.utils.siop.scorer.pool import check_gpus, waiting_threads
from verl.utils.siop.scorer.settings import parser, worker_settings
from verl.utils.siop.scorer.workers import ScoringWorker, WorkerSettings


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch.set_num_threads(1)
    return str(save_causal_lm(tmp_path_factory.mktemp("lm")))


@pytest.fixture
def machine(monkeypatch):
    """Sets the GPUs that this machine seems to have and whether vLLM seems to be installed."""

    def set_up(gpus=0, vllm=False):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if vllm else None)

    return set_up


def settings(*arguments):
    return worker_settings(parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("gpus", "vllm", "arguments", "engine", "workers", "gpus_each"),
    [
        (0, False, "", "transformers", 1, 0),
        (0, True, "", "transformers", 1, 0),
        (0, True, "--engine vllm --num-workers 2", "vllm", 2, 0),
        (4, False, "", "transformers", 4, 1),
        (4, True, "", "vllm", 4, 1),
        (4, True, "--num-gpus 0", "transformers", 1, 0),
        (4, True, "--engine transformers", "transformers", 4, 1),
        (4, True, "--tensor-parallel-size 2", "vllm", 2, 2),
        (4, True, "--tensor-parallel-size 4", "vllm", 1, 4),
        (8, True, "--num-gpus 6 --tensor-parallel-size 2", "vllm", 3, 2),
    ],
)
def test_engine_and_gpus(machine, model_dir, gpus, vllm, arguments, engine, workers, gpus_each):
    machine(gpus, vllm)
    chosen, num_workers, gpus_per_worker = settings("--model", model_dir, *arguments.split())
    assert (chosen.engine, num_workers, gpus_per_worker) == (engine, workers, gpus_each)
    assert chosen.tensor_parallel_size == max(1, gpus_each)
    assert chosen.device == ("cuda" if gpus_each else "cpu")


@pytest.mark.parametrize(
    ("gpus", "vllm", "arguments", "message"),
    [
        (1, False, "--engine vllm", "--engine vllm: vLLM is not installed"),
        (2, True, "--engine transformers --tensor-parallel-size 2", "--tensor-parallel-size is 2, .*vllm takes more"),
        (3, True, "--tensor-parallel-size 2", "--tensor-parallel-size is 2, of which --num-gpus 3"),
        (0, True, "--engine vllm --tensor-parallel-size 2", "--tensor-parallel-size is 2, of which --num-gpus 0"),
        (1, True, "--tensor-parallel-size 0", "--tensor-parallel-size must be more than 0, not 0"),
        (1, True, "--gpu-memory 1.5", "--gpu-memory is 1.5, a share is more than 0 and at most 1"),
        (1, True, "--gpu-memory 0", "--gpu-memory is 0, a share is more than 0"),
        (0, False, "--gpu-memory 0.5", "--gpu-memory is 0.5, but no GPU is used"),
        (2, True, "--num-gpus 3", "--num-gpus is 3, this machine has 2"),
        (0, False, "--lora-path /nowhere", "lora_path: /nowhere holds no LoRA adapter"),
    ],
)
def test_wrong_values_are_named(machine, model_dir, gpus, vllm, arguments, message):
    machine(gpus, vllm)
    with pytest.raises(SiopConfigError, match=message):
        settings("--model", model_dir, *arguments.split())


@pytest.mark.parametrize("option", ["--lora-path /a", "--gpu-memory 0.5", "--engine vllm"])
def test_options_of_a_model_without_one(machine, option):
    machine(1, True)
    with pytest.raises(SiopConfigError, match=f"{option.split()[0]}.*--model is none"):
        settings("--model", "none", *option.split())


def test_options_reach_the_worker(machine, model_dir, tmp_path):
    machine(2, True)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]})
    )
    options = f"--lora-path {tmp_path} --gpu-memory 0.4 --dtype bfloat16 --max-model-len 64 --tensor-parallel-size 2"
    chosen, _, _ = settings("--model", model_dir, *options.split())
    assert (chosen.lora_path, chosen.gpu_memory, chosen.dtype) == (str(tmp_path), 0.4, "bfloat16")
    assert (chosen.max_model_len, chosen.tensor_parallel_size) == (64, 2)


@pytest.mark.parametrize(
    ("engine", "module", "name"),
    [("vllm", "vllm_engine", "VllmEngine"), ("transformers", "transformers_engine", "TransformersEngine")],
)
def test_options_reach_the_engine(monkeypatch, engine, module, name):
    given = {}

    class Engine:
        info = EngineInfo(engine, "m", 64, 8)

        @classmethod
        def from_pretrained(cls, path, **options):
            given.update(options, path=path)
            return cls()

    monkeypatch.setattr(f"verl.utils.siop.scorer.engines.{module}.{name}", Engine)
    chosen = WorkerSettings(
        "m",
        engine,
        device="cuda",
        dtype="float16",
        max_model_len=64,
        lora_path="a",
        gpu_memory=0.4,
        tensor_parallel_size=2,
    )
    assert ScoringWorker(chosen).load() == Engine.info
    expected = {"path": "m", "device": "cuda", "dtype": "float16", "max_model_len": 64, "lora_path": "a"}
    expected |= {"gpu_memory": 0.4, "trust_remote_code": False}
    assert given == expected | ({"tensor_parallel_size": 2} if engine == "vllm" else {})


def test_a_worker_whose_engine_failed_ends(monkeypatch):
    class Ended(BaseException):
        pass

    class Engine:
        def support(self, rollouts):
            if rollouts:
                raise EngineFailed("out of memory")
            return SupportResult([], 0, 0)

    def end(code):
        raise Ended(code)

    worker = ScoringWorker(WorkerSettings("m"))
    worker._model = Engine()
    monkeypatch.setattr("os._exit", end)
    assert worker.support([]).support == []
    with pytest.raises(Ended, match="1"):
        worker.support([1])


@pytest.mark.parametrize(
    ("workers", "each", "nodes", "fits"),
    [
        (2, 1, [2], True),
        (3, 1, [2], False),
        (2, 2, [4], True),
        (2, 2, [3, 3], True),
        (2, 4, [3, 3, 3], False),  # nine GPUs, but no node has four
        (1, 2, [1, 1], False),
    ],
)
def test_gpus_of_a_worker_are_on_one_node(workers, each, nodes, fits):
    if fits:
        check_gpus(workers, each, nodes)
    else:
        with pytest.raises(SiopConfigError, match=f"{workers * each} GPUs are asked for, {each} by each worker"):
            check_gpus(workers, each, nodes)


def save_adapter(path, modules=("q_proj", "down_proj"), **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), init_lora_weights=False, **options)
    model = get_peft_model(case_model(), config)
    model.save_pretrained(path)
    return model.eval()


def test_transformers_engine_with_an_adapter(tmp_path):
    base = save_case_model(tmp_path / "base")
    adapted = save_adapter(tmp_path / "adapter", use_dora=True)
    rollouts = CASES[5].rollouts
    engine = TransformersEngine.from_pretrained(
        str(base), max_model_len=MAX_MODEL_LEN, lora_path=str(tmp_path / "adapter")
    )
    expected = plain_support(adapted, rollouts)
    assert_agrees(engine.support(rollouts), expected)
    assert np.abs(np.array(expected[0]) - np.array(plain_support(case_model(), rollouts)[0])).max() > 0.1


def test_transformers_engine_refuses_an_adapter_for_another_model(tmp_path):
    from safetensors.torch import load_file, save_file

    base, adapter = save_case_model(tmp_path / "base"), tmp_path / "adapter"
    save_adapter(adapter)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if "down_proj" in name]:
        del weights[name]
    save_file(weights, file)
    with pytest.raises(SiopConfigError, match=r"cannot load the LoRA adapter .*missing adapter keys"):
        TransformersEngine.from_pretrained(str(base), lora_path=str(adapter))
    with pytest.raises(SiopConfigError, match="holds no LoRA adapter"):
        TransformersEngine.from_pretrained(str(base), lora_path=str(base))
    # Merged, it would change the embeddings too.
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["lm_head"]}))
    with pytest.raises(SiopConfigError, match="lm_head, whose weights the model uses in two places"):
        TransformersEngine.from_pretrained(str(base), lora_path=str(adapter))


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        scoring_server.main(["--help"])
    text = capsys.readouterr().out
    for option in ("--engine", "--tensor-parallel-size", "--gpu-memory", "--lora-path", "--dtype", "--max-model-len"):
        assert option in text


def test_waiting_threads_go_by_the_users_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert waiting_threads() == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert waiting_threads()["GOMP_SPINCOUNT"] == "7"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert waiting_threads() == {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "7"}
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert waiting_threads() == {"OMP_WAIT_POLICY": "ACTIVE"}
