#!/usr/bin/env bash
# Installs Chromium for the tests of the page over rollouts, unless there is one that starts: with apt-get where that is
# allowed, else Playwright's own, which comes from PLAYWRIGHT_DOWNLOAD_HOST (cdn.playwright.dev) to
# PLAYWRIGHT_BROWSERS_PATH (~/.cache/ms-playwright).
#
#   bash scripts/install_browser.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh

help_if_asked "${BASH_SOURCE[0]}" "${1:-}"
pick_python

found() { "$PYTHON" scripts/find_browser.py >/dev/null 2>&1; }

if found; then exit 0; fi
log=$(mktemp)
say "installing Chromium (log: $log)"
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
        >>"$log" 2>&1 || true
fi
if ! found; then "$PYTHON" -m playwright install chromium >>"$log" 2>&1 || true; fi
if ! reason=$("$PYTHON" scripts/find_browser.py 2>&1 >/dev/null); then
    # "Downloading … from https://HOST/…", then what went wrong.
    host=$(sed -n 's|.* from https\{0,1\}://\([^/]*\)/.*|\1|p' "$log" | tail -n 1)
    if [[ -n $host ]] && grep -qE 'ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|EHOSTUNREACH|ENETUNREACH|Download failure' "$log"; then
        reason="$host, from which Playwright takes it, cannot be reached from here"
    fi
    die "no Chromium could be installed, which tests and screenshots need: $reason (log: $log). Instead, one of:
  - as root: apt-get install chromium   (or any chromium or google-chrome on PATH)
  - PLAYWRIGHT_DOWNLOAD_HOST=https://MIRROR bash scripts/install_browser.sh
  - where there is a network: python -m playwright install chromium; and its folder ~/.cache/ms-playwright copied here"
fi
