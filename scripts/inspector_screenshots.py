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
from PIL import Image

COLOURS = 256
ROOT = Path(__file__).resolve().parent.parent


def export(runs: list[Path], out: Path, *arguments: str) -> str:
    """An exported page of these runs; its address."""
    command = [sys.executable, "-m", "siop_inspector", *map(str, runs), "--export", str(out), *arguments]
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
    both = export([healthy, collapsed], scratch / "both.html")
    other = export([healthy], scratch / "recomputed.html", "--recompute", "ablation=release")
    contested = f"run={healthy.name}&step_from=5&clusters_from=4&clusters_to=4&outcome_from=0.25&outcome_to=0.5"
    with open_browser() as browser:

        def new_page(theme: str = "light", width: int = 1280, height: int = 900) -> Any:
            return browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)

        def shot(page: Any, name: str) -> None:
            path = out / f"inspector_{name}.png"
            page.screenshot(path=path)
            # A third of the size.
            Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
            print(path)

        page = new_page()
        question(page, both, contested)
        page.locator(".piece.call").first.hover()
        shot(page, "question")
        for name, runs, theme in (
            ("healthy", healthy.name, "light"),
            ("collapsed", collapsed.name, "light"),
            ("both", f"{healthy.name},{collapsed.name}", "dark"),
        ):
            page = new_page(theme)
            page.goto(f"{both}#/curves?runs={runs}")
            page.wait_for_selector(".chart")
            shot(page, name)
        page = new_page("dark", width=800, height=800)
        page.goto(f"{both}#/questions?run={healthy.name}&flags=right_negative&sort=advantage_min")
        page.wait_for_selector("tbody tr")
        shot(page, "questions")
        page = new_page(height=620)
        question(page, other, contested)
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
