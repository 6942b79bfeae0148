#!/usr/bin/env bash
# Sets up .venv, .venv/vllm and a Chromium if needed, then runs the linters, the type checker and all tests; those of
# vLLM last.
#
#   bash run_tests.sh [PYTEST_ARGUMENT ...]      e.g. bash run_tests.sh -k advantage
#
# Environment:
#   PYTHON            interpreter for the creation of .venv, 3.10 to 3.12 (found on PATH)
#   OMP_NUM_THREADS   threads of each process (1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}"
bash scripts/setup_env.sh --vllm
VIRTUAL_ENV=$ROOT/.venv bash scripts/install_browser.sh
unset CONDA_ENV
VIRTUAL_ENV=$ROOT/.venv PATH=$ROOT/.venv/bin:$PATH
export VIRTUAL_ENV PATH
use_cpu

say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy
say "import-linter"
python scripts/lint_imports.py
say "shellcheck"
shellcheck -x ./*.sh scripts/*.sh
say "pytest"
# Files side by side; see tests/conftest.py for their order.
python -m pytest -m "not vllm" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" &&
    status=0 || status=$?
say "pytest with vLLM"
.venv/vllm/bin/python -m pytest -m vllm "$@" && vllm_status=0 || vllm_status=$?
# 5: the arguments chose no test of this part.
for code in "$status" "$vllm_status"; do [[ $code == 0 || $code == 5 ]] || exit "$code"; done
