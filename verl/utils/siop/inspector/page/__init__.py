"""The page: HTML, CSS and plain JavaScript modules, served as they are or put into one file."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

PAGE = Path(__file__).parent
STYLE = PAGE / "style.css"
_MAP_MARK, _STYLE_MARK, _MAIN_MARK, _HEAD_MARK = "@IMPORT_MAP@", "@STYLE@", "@MAIN@", "@HEAD@"


def modules() -> list[Path]:
    """The JavaScript modules; ``inspector/NAME`` is what others import ``NAME.js`` by."""
    return sorted(PAGE.glob("*.js"))


def import_map(inline: bool = False) -> str:
    """The import map: to the files of the service, or to their texts themselves."""
    imports = {}
    for path in modules():
        text = base64.b64encode(path.read_bytes()).decode()
        imports[f"inspector/{path.stem}"] = f"data:text/javascript;base64,{text}" if inline else f"/page/{path.name}"
    return json.dumps({"imports": imports})


def html() -> str:
    """The page of the service."""
    return (
        (PAGE / "index.html")
        .read_text(encoding="utf-8")
        .replace(_HEAD_MARK, "")
        .replace(_STYLE_MARK, '<link rel="stylesheet" href="/page/style.css">')
        .replace(_MAP_MARK, import_map())
        .replace(_MAIN_MARK, '<script type="module" src="/page/main.js"></script>')
    )


def standalone(data: str) -> str:
    """The page in one file that needs no network.

    Args:
        data: JSON that the page finds in it.
    """
    scripts = import_map(inline=True), 'import "inspector/main";'
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src data: {allowed}"
    # No text can end the element that holds it.
    safe = data.replace("<", "\\u003c")
    return (
        (PAGE / "index.html")
        .read_text(encoding="utf-8")
        .replace(_HEAD_MARK, f'<meta http-equiv="Content-Security-Policy" content="{policy}">')
        .replace(_STYLE_MARK, f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>")
        .replace(_MAP_MARK, scripts[0])
        .replace(
            _MAIN_MARK,
            f'<script type="application/json" id="embedded">{safe}</script>\n'
            f'<script type="module">{scripts[1]}</script>',
        )
    )
