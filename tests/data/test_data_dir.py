"""DATA_DIR of the launchers: files and settings of a data folder, what wins over them, and a wrong folder."""

from __future__ import annotations

from pathlib import Path

import data_overrides
import pytest
from data_trees import write_jsonl
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from launching import ROOT, Environment, bash, pretended_trainer
from verl.utils.siop.data.build import build
from verl.utils.siop.data.select import Options

TOOLS = "actor_rollout_ref.rollout.multi_turn.tool_config_path"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data with a train and an eval part for a model without thinking."""
    rows = [{"question": f"who is {i}?", "answer": "me"} for i in range(4)]
    sources = [f"{part}={write_jsonl(tmp_path / f'{part}_set.jsonl', rows)}" for part in ("train", "eval")]
    out = tmp_path / "my data"
    build(Options(out=out, source=tuple(sources), prompt="hermes-direct", decontaminate="off"))
    return out


@pytest.fixture
def trainer(tmp_path: Path) -> Environment:
    return {**pretended_trainer(tmp_path), "MODEL_PATH": "m"}


def told(tmp_path: Path) -> str:
    return (tmp_path / "calls").read_text()


def resolved(text: str) -> dict[str, object]:
    """The configuration that the trainer makes of its arguments."""
    words = text.partition("--config-dir\n")[2].partition("\n")[2]
    # A value may have lines of its own: those that do not begin a word belong to the one before.
    arguments: list[str] = []
    for line in words.splitlines():
        key = line.partition("=")[0]
        if "=" in line and " " not in key and "<" not in key:
            arguments.append(line)
        else:
            arguments[-1] += "\n" + line
    with initialize_config_dir(str(ROOT / "verl" / "trainer" / "siop" / "config"), version_base=None):
        config = compose("siop_trainer", overrides=arguments)
    keys = ("data.train_files", "data.val_files", "data.max_prompt_length", "data.max_response_length", TOOLS)
    found: dict[str, object] = {"kwargs": config.data.apply_chat_template_kwargs, "algorithm": config.algorithm}
    for key in keys:
        value = config
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


def test_training_takes_files_and_settings_from_the_folder(tmp_path: Path, folder: Path, trainer: Environment) -> None:
    done = bash("train_siop.sh", env={**trainer, "DATA_DIR": f"{folder}/"})
    assert done.returncode == 0, done.stderr
    config = resolved(told(tmp_path))
    assert (
        config["data.train_files"] == f"{folder}/train.parquet" and config["data.val_files"] == f"{folder}/eval.parquet"
    )
    assert config["kwargs"] == {"enable_thinking": False}
    assert config["algorithm"].siop_reference_prefix == "<answer>\n"  # type: ignore[attr-defined]
    assert config["algorithm"].siop_reference_suffix == "\n</answer><|im_end|>"  # type: ignore[attr-defined]
    assert config[TOOLS] == "config/local_search_tool_config.yaml"


def test_variables_and_overrides_win_over_the_folder(tmp_path: Path, folder: Path, trainer: Environment) -> None:
    (folder / "overrides.yaml").write_text(f'{TOOLS}: "/tools of mine.yaml"\ndata.max_prompt_length: 1536\n'
                                           "data.max_response_length: 512\n")  # fmt: skip
    env = {**trainer, "DATA_DIR": folder}
    assert bash("train_siop.sh", env=env).returncode == 0
    config = resolved(told(tmp_path))
    assert (config[TOOLS], config["data.max_prompt_length"]) == ("/tools of mine.yaml", 1536)
    own = {"TOOL_CONFIG": "other.yaml", "MAX_PROMPT_LENGTH": "99", "VAL_FILE": "v.parquet"}
    assert bash("train_siop.sh", "data.max_response_length=77", env={**env, **own}).returncode == 0
    config = resolved(told(tmp_path))
    assert (config[TOOLS], config["data.max_prompt_length"], config["data.max_response_length"]) == (
        "other.yaml",
        99,
        77,
    )
    assert (config["data.train_files"], config["data.val_files"]) == (f"{folder}/train.parquet", "v.parquet")


def test_an_evaluation_takes_the_folder_too(tmp_path: Path, folder: Path, trainer: Environment) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    env = {**trainer, "DATA_DIR": folder, "MODEL_PATH": model}
    (folder / "train.parquet").unlink()
    done = bash("eval_siop.sh", env=env)
    assert done.returncode == 0, done.stderr
    assert f"data.val_files='{folder}/eval.parquet'" in told(tmp_path)
    assert "++data.apply_chat_template_kwargs.enable_thinking=false" in told(tmp_path)
    toy = bash("eval_siop.sh", "--toy-seed", "3", env={**env, "MODEL_PATH": ""})
    assert toy.returncode == 1 and "--toy-seed 3 name different data: unset DATA_DIR" in toy.stderr
    training = bash("train_siop.sh", env=env)
    assert (
        training.returncode == 1
        and f"error: DATA_DIR={folder} holds no train.parquet: set TRAIN_FILE" in training.stderr
    )


def test_a_wrong_folder_is_refused_by_name(tmp_path: Path, folder: Path, trainer: Environment) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "none"):
        for script in ("train_siop.sh", "doctor.sh"):
            done = bash(script, env={**trainer, "DATA_DIR": wrong})
            assert done.returncode == 1 and not (tmp_path / "calls").exists()
            assert f"error: DATA_DIR={wrong}: no manifest.json there; a data folder is made by" in done.stderr
    for text, message in (
        ("- x", "overrides.yaml needs lines of the form key: value, got list"),
        ("data.x: [1]", "data.x has a list; allowed are text"),
        ("a: [", "overrides.yaml cannot be read"),
    ):
        (folder / "overrides.yaml").write_text(text)
        done = bash("train_siop.sh", env={**trainer, "DATA_DIR": folder})
        assert done.returncode == 1 and message in done.stderr and not (tmp_path / "calls").exists()
    without = bash("train_siop.sh", env={**trainer, "DATA_DIR": folder, "MODEL_PATH": ""})
    assert without.returncode == 1  # the folder's fault comes first, and never the toy world


def test_numbers_are_numbers(tmp_path: Path, folder: Path, trainer: Environment) -> None:
    """PyYAML alone takes 1e-6, which has no point, for a text."""
    (folder / "overrides.yaml").write_text(
        "actor_rollout_ref.actor.optim.lr: 1e-6\nx.a: 1E+3\nx.b: '1e-6'\nx.c: .inf\n"
    )
    words = data_overrides.overrides(folder)
    values = [OverridesParser.create().parse_override(word).value() for word in words]
    assert values == [1e-6, 1000.0, "1e-6", float("inf")]
    assert [type(value) for value in values[:2]] == [float, float]
    (folder / "overrides.yaml").write_text("actor_rollout_ref.actor.optim.lr: 1e-6\n")
    done = bash("train_siop.sh", env={**trainer, "DATA_DIR": folder})
    assert done.returncode == 0 and "actor_rollout_ref.actor.optim.lr=1e-06\n" in told(tmp_path)


@given(st.floats())
def test_hydra_reads_every_number_back(number: float) -> None:
    (word,) = data_overrides.words("a.b", number)
    assert repr(OverridesParser.create().parse_override(word).value()) == repr(number)


@example("a\\'b")
@example("'\\\\'")
@example("end\\")
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_hydra_reads_every_text_back(text: str) -> None:
    (word,) = data_overrides.words("a.b", text)
    assert OverridesParser.create().parse_override(word).value() == text


def test_mappings_may_hold_new_keys() -> None:
    value = {"enable_thinking": False, "more": {"depth": 2, "name": None}}
    assert data_overrides.words("data.x", value) == [
        "++data.x.enable_thinking=false",
        "++data.x.more.depth=2",
        "++data.x.more.name=null",
    ]
