#!/usr/bin/env bash
# Installs Chromium for the tests of the page over rollouts, unless there is one: with apt-get where that is allowed,
# else Playwright's own.
#
#   bash scripts/install_browser.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}"
pick_python

if "$PYTHON" scripts/find_browser.py >/dev/null 2>&1; then exit 0; fi
log=$(mktemp)
say "installing Chromium (log: $log)"
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
        >>"$log" 2>&1 || true
fi
if ! "$PYTHON" scripts/find_browser.py >/dev/null 2>&1; then
    "$PYTHON" -m playwright install chromium >>"$log" 2>&1 || true
fi
"$PYTHON" scripts/find_browser.py >/dev/null 2>&1 ||
    die "no Chromium could be installed ($log); install one (Debian: apt-get install chromium) and put it on PATH"
