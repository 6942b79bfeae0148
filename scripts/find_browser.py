"""Prints the Chromium of tests and screenshots: Playwright's own, else one on PATH. Exit status 1 if none starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = "no Chromium found: run bash scripts/install_browser.sh"


def find_browser(chromium: Any) -> str | None:
    """The path of a Chromium, Playwright's own or one on PATH, or None."""
    own = chromium.executable_path
    return own if Path(own).is_file() else next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright.

    Raises:
        RuntimeError: there is none, or it does not start.
    """
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        path = find_browser(playwright.chromium)
        if path is None:
            raise RuntimeError(NO_BROWSER)
        # Chromium's sandbox does not work for root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        try:
            browser = playwright.chromium.launch(executable_path=path, args=arguments)
        except Error as error:
            lines = [line.split("[err]")[-1].strip() for line in str(error).splitlines() if line.strip()]
            why = next((line for line in lines if "shared libraries" in line), lines[0])
            raise RuntimeError(f"{path} does not start: {why}") from error
        try:
            yield browser
        finally:
            browser.close()


def main() -> int:
    """The command; its exit status."""
    try:
        with open_browser() as browser:
            print(find_browser(browser.browser_type))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
