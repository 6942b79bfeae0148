"""A folder that holds an index: its files, and ``manifest.json``, which says what they are and of which corpus.

It is written aside and renamed, so that half an index is never found, and is used only if every byte of it and of the
corpus is what it was when it was built.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm
from verl.utils.siop.retriever.corpus import CorpusError

MANIFEST = "manifest.json"
OLD = "siop_index.json"  # what BM25 of format 1 had instead
_BLOCK = 2**22
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
    """What an index is.

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
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
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
        IndexFolderError: there is none, or none of this version.
    """
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        if (folder / OLD).is_file():
            raise IndexFolderError(f"{folder} holds an index of format 1, which is not read; build it again") from error
        raise IndexFolderError(f"{folder} holds no index ({MANIFEST} is missing)") from error
    except OSError as error:
        raise IndexFolderError(f"cannot read {folder / MANIFEST}: {error.strerror}") from error
    except ValidationError as error:
        raise IndexFolderError(
            f"{folder / MANIFEST} is damaged or of another version; build the index again"
        ) from error


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


def check_target(target: Path) -> None:
    """Before anything is built.

    Raises:
        CorpusError: ``target`` is there and is not the folder of an index.
    """
    if target.exists() and not target.is_dir():
        raise CorpusError(f"{target} is a file; the index needs a folder")
    if target.is_dir() and any(target.iterdir()) and not any((target / name).is_file() for name in (MANIFEST, OLD)):
        raise CorpusError(f"{target} is not empty and holds no index; choose another folder")


@contextmanager
def new_folder(target: Path, scratch: Path | None = None) -> Iterator[Path]:
    """An empty folder that takes the place of ``target`` when the block ends, and is gone if that raises.

    Args:
        target: the folder of an index, or nothing yet.
        scratch: where it grows, on the same file system; what a killed process left there is removed. One with a name
            of its own beside ``target`` if not given.

    Raises:
        CorpusError: as :func:`check_target`.
    """
    check_target(target)
    if scratch is None:
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``: as the last file of a folder.

    Raises:
        CorpusError: the disk is full.
    """
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all.

    Raises:
        CorpusError: the disk is full.
    """
    scratch = path.with_name(f".{path.name}")
    try:
        scratch.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CorpusError(f"cannot write {path}: {error.strerror}") from error
    scratch.replace(path)


def identify_files(folder: Path, paths: Iterable[Path]) -> dict[str, FileIdentity]:
    """``Manifest.files`` of these files in the folder."""
    return {str(path.relative_to(folder)): identify(path) for path in sorted(paths)}
