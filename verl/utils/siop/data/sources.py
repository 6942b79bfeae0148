"""The files that questions are read from: on the hub, on GitHub, in a folder of that layout, or named one by one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import constants
from tqdm import tqdm
from verl.utils.siop.data.presets import PARTS, Preset
from verl.utils.siop.errors import SiopError
from verl.utils.siop.files import blocks, workplace

GITHUB = "https://raw.githubusercontent.com"
TIMEOUT_S = 30.0  # without a byte
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
SPLITS = {"train": "train", "dev": "eval", "validation": "eval", "val": "eval", "test": "eval"}
_NAMED = re.compile(r"(?:(train|eval)(?::([\w.-]+))?=)?(.+)", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class SourceError(SiopError, ValueError):
    """Questions cannot be had from a source: it is missing, damaged, or not of a shape that is read.

    The message names the file and, where it is one of its rows, the line.
    """


@dataclass(frozen=True)
class SourceFile:
    """One file and what is taken from it.

    Args:
        path: where it lies.
        name: what the manifest calls it.
        part: ``train`` or ``eval``; empty if its rows tell it by their split.
        set: the set of rows that name none.
        split: the split of rows that name none.
        wanted: names of the sets to take; empty: all.
        origin: where it was published: ``repo``, ``revision``.
    """

    path: Path
    name: str
    part: str
    set: str
    split: str
    wanted: tuple[str, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)


def stem_of(path: Path) -> str:
    """The name of a file without its extension, ``.jsonl.gz`` being one.

    Raises:
        SourceError: the extension is none that is read.
    """
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise SourceError(f"{path}: files of this name are not read; allowed are {', '.join(SUFFIXES)}")
    return path.name.removesuffix(suffix)


def _described(path: Path, name: str, part: str = "", set_name: str = "") -> SourceFile:
    """A file by its layout: ``SET/SPLIT.jsonl``, or else the set has the name of the file."""
    stem = stem_of(path)
    split = stem if stem in SPLITS else ""
    named = path.absolute().parent.name if split else stem
    return SourceFile(path, name, part or SPLITS.get(split, ""), (set_name or named).lower(), split)


# ---------------------------------------------------------------------- named by the user
def own_files(sources: Sequence[str]) -> list[SourceFile]:
    """Files that are named one by one, as ``PATH``, ``train=PATH`` or ``eval:SET=PATH``, and all of a named folder.

    Raises:
        SourceError: a path is missing, or a folder holds no file to read.
    """
    found: list[SourceFile] = []
    for source in sources:
        named = _NAMED.fullmatch(source)
        part, set_name, text = named.groups() if named else ("", "", source)
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [item for item in sorted(path.rglob("*")) if item.name.endswith(SUFFIXES) and item.is_file()]
            if not inside:
                raise SourceError(f"--source {source}: the folder holds no {', '.join(SUFFIXES)}")
            found += [_described(item, str(item.relative_to(path)), part or "", set_name or "") for item in inside]
        elif path.is_file():
            found.append(_described(path, path.name, part or "", set_name or ""))
        else:
            raise SourceError(f"--source {source}: no such file or folder")
    return found


# ---------------------------------------------------------------------- of a preset
def preset_files(
    preset: Preset, sets: dict[str, Sequence[str]], root: Path, origin: dict[str, str]
) -> list[SourceFile]:
    """The files of a preset below ``root``: in the layout of its publication, or packed as ``train`` and ``test``.

    Args:
        preset: names the file of each set.
        sets: the sets to take for ``train`` and ``eval``.
        root: folder of the publication, or a copy of it.
        origin: for the manifest.

    Raises:
        SourceError: a file is missing; the message names the sets that it would hold.
    """
    found = []
    for part in PARTS:
        stems: dict[str, list[str]] = {}
        for name in sets[part]:
            stems.setdefault(preset.files(part)[name], []).append(name)
        paths = {stem: _with_suffix(root, stem) for stem in stems}
        if stems and not any(paths.values()) and (packed := _with_suffix(root, "train" if part == "train" else "test")):
            stems, paths = {packed.name: list(sets[part])}, {packed.name: packed}
        for stem, names in stems.items():
            path = paths[stem]
            if path is None:
                raise SourceError(
                    f"{root}: no {stem} with one of {', '.join(SUFFIXES)}, from which preset {preset.name} takes "
                    f"{', '.join(names)} for {part}; add it, or leave these sets out with --{part}"
                )
            split = stem_of(path)
            name = path.relative_to(root).as_posix()
            found.append(SourceFile(path, name, part, names[0] if len(names) == 1 else "", split, tuple(names), origin))
    return found


def _with_suffix(root: Path, stem: str) -> Path | None:
    found = [path for suffix in SUFFIXES if (path := root / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise SourceError(f"{root}: both {found[0].name} and {found[1].name} hold {stem}; leave one")
    return found[0] if found else None


def fetch(preset: Preset, stems: Collection[str], revision: str | None) -> tuple[Path, dict[str, str]]:
    """The published files of a preset, from the cache where they are in it.

    ``HF_HOME`` says where the cache is; with ``HF_HUB_OFFLINE=1`` nothing else is asked.

    Args:
        preset: see :data:`~verl.utils.siop.data.presets.PRESETS`.
        stems: its files, without extensions.
        revision: branch, tag or commit; None for the preset's.

    Returns:
        The folder of the publication's layout, and its ``repo`` and ``revision`` (the commit, where it is known).

    Raises:
        SourceError: they cannot be had; the message names the address and the reason.
    """
    revision = revision or preset.revision
    names = [f"{stem}{preset.suffix}" for stem in sorted(set(stems))]
    if preset.host == "hub":
        return _from_hub(preset.repo, revision, names)
    return _from_github(preset.repo, revision, names)


def _from_hub(repo: str, revision: str, names: list[str]) -> tuple[Path, dict[str, str]]:
    try:
        folder = huggingface_hub.snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=names)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise SourceError(
            f"hub data set {repo} at {revision}: {_one_line(error)}; with a copy on disk use --source DIR"
        ) from error
    path = Path(folder)
    commit = path.name if _COMMIT.fullmatch(path.name) else revision
    return path, {"repo": f"https://huggingface.co/datasets/{repo}", "revision": commit}


def _from_github(repo: str, revision: str, names: list[str]) -> tuple[Path, dict[str, str]]:
    root = Path(constants.HF_HOME) / "siop" / "github" / repo / revision
    for name in names:
        path, url = root / name, f"{GITHUB}/{repo}/{revision}/{name}"
        if constants.HF_HUB_OFFLINE:
            if not path.is_file():
                raise SourceError(f"{url}: not in the cache ({path}), and HF_HUB_OFFLINE=1 forbids to fetch it")
        elif not (_COMMIT.fullmatch(revision) and path.is_file()):  # what a branch holds may have changed
            _download(url, path)
    return root, {"repo": f"https://github.com/{repo}", "revision": revision}


def _download(url: str, path: Path) -> None:
    try:
        with workplace(path) as place:
            partial = place / path.name
            with (
                httpx.stream("GET", url, timeout=TIMEOUT_S, follow_redirects=True) as response,
                partial.open("wb") as file,
            ):
                response.raise_for_status()
                total = int(response.headers.get("content-length") or 0) or None
                with tqdm(total=total, desc=f"fetch {path.name}", unit="B", unit_scale=True) as bar:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
                        bar.update(len(chunk))
            with partial.open("rb") as file:
                if file.read(40).startswith(b"version https://git-lfs"):
                    raise SourceError(f"{url}: a pointer of Git LFS, not the file itself")
            partial.replace(path)
    except (OSError, httpx.HTTPError) as error:
        raise SourceError(f"{url}: {_one_line(error)}; with a copy on disk use --source DIR") from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---------------------------------------------------------------------- what a file is
def digests(path: Path) -> tuple[str, str]:
    """SHA-256 of a file, and its git blob (SHA-1 of ``blob SIZE\\0`` and the content).

    Raises:
        SourceError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        for block in blocks(path):
            sha256.update(block)
            blob.update(block)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    return sha256.hexdigest(), blob.hexdigest()
