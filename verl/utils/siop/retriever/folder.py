"""A folder that holds an index: its files, and ``manifest.json``, which says what they are and of which corpus.

It is written aside and renamed, so that half an index is never found, and is used only if every byte of it and of the
corpus is what it was when it was built.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from tqdm import tqdm
from verl.utils.siop.files import blocks
from verl.utils.siop.retriever.corpus import CorpusError
from verl.utils.siop.retriever.parts import NEW, replace

MANIFEST = "manifest.json"
OLD = "siop_index.json"  # what BM25 of format 1 had instead
_OLD_FILES = re.compile(r"offsets\.npy|[a-z_.]+\.index\.(npy|json)")
# Kind -> the files that an index of it has: no more and no less. The shards of a flat one come on top.
_DENSE = frozenset({"offsets.npy", "probes.npy"})
_FAISS = _DENSE | {"index.faiss"}
FILES: dict[str, frozenset[str]] = {
    "bm25": frozenset(f"{name}.npy" for name in ("keys", "starts", "documents", "impacts", "bounds", "offsets")),
    "documents": frozenset({"keys.npy", "numbers.npy", "offsets.npy"}),
    "flat": _DENSE,
    "hnsw": _FAISS,
    "hnsw_sq8": _FAISS,
    "ivf_sq8": _FAISS,
    "qdrant": _DENSE,
}
_SCRATCH = re.compile(r"\..+\.(npy|json)\.\d+")
_THREADS = 4  # hashing leaves the interpreter to others


class IndexFolderError(CorpusError):
    """The folder holds no index that can be used; the message names the folder, the file and what is wrong with it."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileIdentity(_Model):
    """What is the same as long as the content of a file is."""

    bytes: int
    sha256: str


class CorpusIdentity(FileIdentity):
    path: str
    documents: int


class Manifest(_Model):
    """What an index is; its file has a digest of all this too.

    Attributes:
        kind: bm25, flat, hnsw, ...
        libraries: name -> version of what its files can be read with.
        settings: what it was built with; of a dense index the encoder too.
        self_test: numbers of documents that their own text finds at rank 1.
        measured: seconds, memory and recall of the build.
        files: by path relative to the folder.
    """

    format: Literal[2] = 2
    kind: str
    corpus: CorpusIdentity
    libraries: dict[str, str]
    settings: dict[str, Any]
    self_test: list[int]
    measured: dict[str, Any]
    files: dict[str, FileIdentity]


def identify(path: Path, bar: tqdm | None = None) -> FileIdentity:
    """Size and digest of a file.

    Raises:
        CorpusError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        for block in blocks(path):
            digest.update(block)
            size += len(block)
            if bar is not None:
                bar.update(len(block))
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error
    return FileIdentity(bytes=size, sha256=digest.hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone; its files are not looked at.

    Raises:
        IndexFolderError: there is none, none of this version, it was changed after it was written, or it lists other
            files than those of its kind.
    """
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_bytes())
        if fields.pop("sha256") != _digest(fields):
            raise ValueError("its digest is another one")
        manifest = Manifest.model_validate(fields)
    except FileNotFoundError as error:
        if (folder / OLD).is_file():
            raise IndexFolderError(f"{folder} holds an index of format 1, which is not read; build it again") from error
        raise IndexFolderError(f"{folder} holds no index ({MANIFEST} is missing)") from error
    except NotADirectoryError as error:
        raise IndexFolderError(
            f"{folder} is a file, and an index is a folder; if it is the corpus, --corpus names it"
        ) from error
    except OSError as error:
        raise IndexFolderError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IndexFolderError(f"{path} is damaged or of another version; build the index again") from error
    _check_names(folder, manifest)
    return manifest


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def manifest_text(fields: Mapping[str, Any]) -> str:
    """``manifest.json`` of these fields, with their digest."""
    return json.dumps({**fields, "sha256": _digest(fields)}, indent=2) + "\n"


def shard_name(number: int) -> str:
    """Of a shard of vectors, relative to the folder of a flat index."""
    return f"vectors/{number:05d}.f16.npy"


def _check_names(folder: Path, manifest: Manifest) -> None:
    where = f"{folder / MANIFEST}: the index is of another version or damaged"
    if manifest.kind not in FILES:
        raise IndexFolderError(f"{where}: kind is {manifest.kind!r}, known are {', '.join(FILES)}")
    expected = set(FILES[manifest.kind])
    if manifest.kind == "flat":
        rows = manifest.settings.get("shard_rows")
        if not isinstance(rows, int) or rows < 1:
            raise IndexFolderError(f"{where}: settings.shard_rows is {rows!r}, a whole number from 1 is expected")
        expected |= {shard_name(number) for number in range(-(-manifest.corpus.documents // rows))}
    if differing := sorted(expected ^ set(manifest.files)):
        few = ", ".join(differing[:3])
        raise IndexFolderError(f"{where}: files has other names than kind {manifest.kind} ({few}); build it again")


def check_folder(folder: Path, manifest: Manifest, corpus: Path | None = None, *, show_progress: bool = True) -> Path:
    """Compares every file of the index, and the corpus, with the manifest; returns the path of the corpus.

    Args:
        folder: of the index.
        manifest: read from it.
        corpus: where the corpus is, if it has moved since.

    Raises:
        IndexFolderError: a file is missing, cut or changed, or the corpus is another one.
    """
    corpus = Path(manifest.corpus.path) if corpus is None else corpus
    expected: dict[Path, FileIdentity] = {folder / name: identity for name, identity in manifest.files.items()}
    for path, identity in [*expected.items(), (corpus, manifest.corpus)]:
        if not path.is_file():
            raise IndexFolderError(f"the index in {folder} needs {path}, which is not there")
        if path.stat().st_size != identity.bytes:
            raise IndexFolderError(_differs(folder, path, corpus, f"{path.stat().st_size} bytes, not {identity.bytes}"))
    total = manifest.corpus.bytes + sum(identity.bytes for identity in expected.values())
    with (
        tqdm(desc=f"check {folder.name}", total=total, unit="B", unit_scale=True, disable=not show_progress) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        paths = [*expected, corpus]
        for path, found in zip(paths, pool.map(lambda path: identify(path, bar), paths), strict=True):
            if found.sha256 != (manifest.corpus if path is corpus else expected[path]).sha256:
                raise IndexFolderError(_differs(folder, path, corpus, "its content has changed"))
    return corpus


def _differs(folder: Path, path: Path, corpus: Path, what: str) -> str:
    if path is corpus:
        return f"{corpus} has changed since the index in {folder} was built, or is another corpus ({what})"
    return f"{path} is damaged: {what}; build the index again"


def check_target(target: Path, kind: str) -> None:
    """Before anything is built, and before anything is replaced.

    What may be replaced is nothing, an empty folder, or an index of the same ``kind`` and no other file with it. Its
    manifest may be cut, if files of the kind are there and no others.

    Raises:
        CorpusError: anything else is there; the message names it.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise CorpusError(f"{target} is a file; the index needs a folder")
    names = {path.name for path in target.iterdir()}
    if not names:
        return
    if not names & {MANIFEST, OLD}:
        raise CorpusError(f"{target} is not empty and holds no index; choose another folder")
    what = f"holds an index of kind {kind}"
    if MANIFEST in names:
        own = names & FILES[kind]
        try:
            found = json.loads((target / MANIFEST).read_bytes())
        except (OSError, ValueError, RecursionError):
            what = f"holds a damaged {MANIFEST}"
        else:
            there = found.get("kind") if isinstance(found, dict) else None
            if there != kind and there in FILES:
                raise CorpusError(f"{target} holds an index of kind {there}, not {kind}; choose another folder")
            if there != kind:
                raise CorpusError(f"{target} holds a {MANIFEST} that is not of an index; choose another folder")
    else:
        what = "holds an index of format 1"
        own = {name for name in names if _OLD_FILES.fullmatch(name)} if kind == "bm25" else set()
    if foreign := sorted(names - own - {MANIFEST, OLD}):
        raise CorpusError(
            f"{target} {what}, and {', '.join(foreign[:3])}, which no index of kind {kind} has: it is not replaced; "
            "choose another folder, or move that away"
        )
    if not own:
        raise CorpusError(f"{target} {what}, and no file of an index of kind {kind}; choose another folder")


@contextmanager
def new_folder(target: Path, parts: Path, kind: str) -> Iterator[Path]:
    """An empty folder that takes the place of ``target`` when the block ends, and is gone if that raises.

    Args:
        target: the folder of an index of the same kind, or nothing yet.
        parts: of :func:`locked_parts`.
        kind: of the index.

    Raises:
        CorpusError: as :func:`check_target`.
    """
    check_target(target, kind)
    scratch = parts / NEW
    try:
        scratch.mkdir()
        yield scratch
        check_target(target, kind)  # hours may have passed
        replace(target, parts)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``: as the last file of a folder.

    Raises:
        CorpusError: the disk is full.
        IndexFolderError: the files are not those of the kind.
    """
    _check_names(folder, manifest)
    write_whole(folder / MANIFEST, manifest_text(manifest.model_dump(mode="json")).encode())


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file aside and renames it, so that half of it is never found.

    Raises:
        CorpusError: it cannot be written, as on a full disk.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise CorpusError(f"cannot write {path} ({len(data)} bytes): {error.strerror}") from error


def sweep(folder: Path) -> None:
    """Removes what a process that was killed was writing with :func:`write_whole`."""
    for path in folder.iterdir():
        if _SCRATCH.fullmatch(path.name):
            path.unlink()


def identify_files(folder: Path, paths: Iterable[Path]) -> dict[str, FileIdentity]:
    """``Manifest.files`` of these files in the folder."""
    return {str(path.relative_to(folder)): identify(path) for path in sorted(paths)}
