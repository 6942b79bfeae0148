#!/usr/bin/env bash
# Creates .venv in the repository and installs the project for a machine without a GPU, tests included. Does nothing if
# that has been done for the present requirements. On a GPU machine use: pip install -r requirements.txt
#
#   bash scripts/setup_env.sh        PYTHON=python3.11 chooses the interpreter (3.10 to 3.12)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Two calls at once would install into the same place.
mkdir -p .venv
exec 9>.venv/.lock
flock 9

stamp=.venv/.siop-requirements
want=$(cat pyproject.toml requirements-cpu.txt | cksum)
if [[ -f $stamp && $(cat "$stamp") == "$want" ]]; then
    exit 0
fi

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

# pip comes last: without it an earlier creation was interrupted.
if [[ ! -x .venv/bin/pip ]]; then
    python=$(find_python)
    echo "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

cpu_index=https://download.pytorch.org/whl/cpu
index=()
if .venv/bin/python - "$cpu_index/torch/" <<'PY'; then
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=5).close()
except OSError:
    sys.exit(1)
PY
    index=(--extra-index-url "$cpu_index")
fi
echo "installing requirements-cpu.txt into .venv (a few minutes; log: .venv/install.log)"
# Twice, so that torch's CPU build is there before anything else asks for torch.
if ! { .venv/bin/pip install --disable-pip-version-check "${index[@]}" "$(grep '^torch==' requirements-cpu.txt)" &&
    .venv/bin/pip install --disable-pip-version-check "${index[@]}" -r requirements-cpu.txt; } >.venv/install.log 2>&1; then
    tail -n 20 .venv/install.log >&2
    echo "error: the installation failed; the whole log is .venv/install.log" >&2
    exit 1
fi
echo "$want" >"$stamp"
