#!/usr/bin/env bash
# Sets up .venv if needed, then runs the linters, the type checker and all tests.
#
#   bash run_tests.sh [PYTEST_ARGUMENT ...]      e.g. bash run_tests.sh -k advantage
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}"
bash scripts/setup_env.sh
unset CONDA_ENV
VIRTUAL_ENV=$ROOT/.venv PATH=$ROOT/.venv/bin:$PATH
export VIRTUAL_ENV PATH
use_cpu

say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy
say "shellcheck"
shellcheck -x ./*.sh scripts/*.sh
say "pytest"
python -m pytest "$@"
