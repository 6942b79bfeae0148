"""Takes the screenshots of docs/inspector.md and README, of a healthy and a collapsed run.

    python scripts/inspector_screenshots.py [--healthy runs/quickstart/siop-seed1-60] \
        [--collapsed runs/quickstart/release-seed1-60] [--out docs/images]

The runs are those of bash quickstart.sh and bash quickstart.sh --method release. Needs a Chromium, see
scripts/install_browser.sh.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from find_browser import open_browser

ROOT = Path(__file__).resolve().parent.parent


def export(runs: list[Path], out: Path, *arguments: str) -> str:
    """An exported page of these runs; its address."""
    command = [sys.executable, "-m", "verl.utils.siop.inspector", *map(str, runs), "--export", str(out), *arguments]
    subprocess.run(command, cwd=ROOT, check=True)
    return out.as_uri()


def question(page: Any, base: str, search: str) -> None:
    """Open the first question of a search."""
    page.goto(f"{base}#/questions?{search}")
    page.wait_for_selector("tbody tr a.open")
    page.locator("tbody tr a.open").first.click()
    page.wait_for_selector(".turn")
    page.wait_for_timeout(200)


def take(healthy: Path, collapsed: Path, out: Path, scratch: Path) -> None:
    """All screenshots."""
    one = export([healthy], scratch / "healthy.html", "--recompute", "ablation=release")
    other = export([collapsed], scratch / "collapsed.html")
    both = export([healthy, collapsed], scratch / "both.html")
    plain = export([healthy], scratch / "plain.html")
    with open_browser() as browser:

        def new_page(theme: str = "light", width: int = 1280, height: int = 800) -> Any:
            return browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)

        def shot(page: Any, name: str) -> None:
            page.screenshot(path=out / f"inspector_{name}.png")
            print(f"{out / f'inspector_{name}.png'}")

        hard = f"run={healthy.name}&step_from=5&clusters_from=4&clusters_to=4&outcome_from=0.25&outcome_to=0.5"
        page = new_page(height=900)
        question(page, plain, hard)
        page.locator(".piece.call").first.hover()
        shot(page, "question")
        for name, address, theme in (("healthy", one, "light"), ("collapsed", other, "light"), ("both", both, "dark")):
            page = new_page(theme, height=930)
            page.goto(address)
            page.wait_for_selector(".chart")
            shot(page, name)
        page = new_page("dark", width=800)
        page.goto(f"{plain}#/questions?run={healthy.name}&flags=right_negative&sort=advantage_min")
        page.wait_for_selector("tbody tr")
        shot(page, "questions")
        page = new_page(height=620)
        question(page, one, hard)
        shot(page, "recomputed")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=Path, default=ROOT / "runs/quickstart/siop-seed1-60")
    parser.add_argument("--collapsed", type=Path, default=ROOT / "runs/quickstart/release-seed1-60")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        take(args.healthy.resolve(), args.collapsed.resolve(), args.out, Path(scratch))


if __name__ == "__main__":
    main()
