"""What the launchers' variables say is what Hydra reads."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from launch_variables import overrides, problem, quoted
from launching import bash
from omegaconf import OmegaConf


def _read(override: str) -> Any:
    value = OverridesParser.create().parse_override(override).value()
    config = OmegaConf.create({"value": value})
    return OmegaConf.to_container(config.value) if OmegaConf.is_list(config.value) else config.value


NUMBERS = ["2024_05_01", "42", "1e5", ".5", "1_0", "-1", "nan", "Infinity", "null", "True"]
OTHERS = [
    "été",
    "日本",
    "~/x",
    "a\\b",
    "\\",
    "it's",
    "\\'",
    'say "x"',
    "a b",
    "a\tb",
    "a=b",
    "a,b",
    "[x",
    "x]",
    "{a:b}",
    "#1",
]
PLAIN = ["a:b", "http://x/y", "(1)", "+x"]


@pytest.mark.parametrize("text", NUMBERS + OTHERS + PLAIN)
def test_a_text_stays_a_text(text: str) -> None:
    for name, key in (("OUTPUT_DIR", "trainer.default_local_dir"), ("PROJECT_NAME", "trainer.project_name")):
        assert problem("train", {name: text}) is None
        (override,) = overrides("train", {name: text})
        assert override.startswith(f"{key}=") and _read(override) == text


@given(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0$"), min_size=1))
def test_any_text_stays_a_text(text: str) -> None:
    assert _read(f"key={quoted(text)}") == text


@pytest.mark.parametrize("text", ["checkpoints/siop", "/a/b_c-1.0", "Qwen/Qwen3-4B", "./x", "nulls"])
def test_an_ordinary_path_needs_no_quotes(text: str) -> None:
    assert quoted(text) == text


@pytest.mark.parametrize(
    ("value", "files"),
    [
        ("[a(1).parquet,b.parquet]", ["a(1).parquet", "b.parquet"]),
        ("[/d/a=b.parquet, c d.parquet]", ["/d/a=b.parquet", "c d.parquet"]),
        ("[it's.parquet,2024]", ["it's.parquet", "2024"]),
        ("2024", "2024"),
    ],
)
def test_several_files(value: str, files: Any) -> None:
    (override,) = overrides("train", {"TRAIN_FILE": value})
    assert _read(override) == files


def test_what_hydra_would_replace_is_refused() -> None:
    assert "OUTPUT_DIR=${HOME}/x is not allowed: ${ begins" in (problem("train", {"OUTPUT_DIR": "${HOME}/x"}) or "")
    assert "EXPERIMENT_NAME=siop/main is not allowed: a name without /" in (
        problem("train", {"EXPERIMENT_NAME": "siop/main"}) or ""
    )


@pytest.mark.parametrize("script", ["launch_siop_scorer.sh", "launch_retriever.sh"])
@pytest.mark.parametrize("action", ["stop", "status"])
def test_a_dry_run_is_of_a_start(script: str, action: str) -> None:
    done = bash(script, action, "--dry-run")
    assert done.returncode == 1 and f"error: --dry-run is for start, not for {action}" in done.stderr
