"""``manifest.json`` of a data folder: what it was made of, what it holds, and whether it still holds that."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from verl.utils.siop.data.presets import PARTS
from verl.utils.siop.data.rows import SCHEMA, canonical
from verl.utils.siop.errors import SiopError
from verl.utils.siop.files import sha256_of

MANIFEST, OVERRIDES = "manifest.json", "overrides.yaml"
FORMAT = 1
ADVICE = "a data folder is made by python -m verl.utils.siop.data build"


class FolderError(SiopError, ValueError):
    """A folder is none that ``build`` has made, holds something else than its manifest says, or cannot be written."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SetCounts(_Model):
    """One set of an output.

    Attributes:
        read: rows of the source.
        dropped: rows that were left out, by reason.
        rows: rows that were written.
        aliases_mean: aliases of a labelled row.
        aliases_max: the most that a row has.
        yes_no: share of labelled rows whose answer is yes or no.
        unreachable: rows of which no alias is short enough for a short answer to equal it.
    """

    read: int = 0
    dropped: dict[str, int] = {}
    rows: int = 0
    aliases_mean: float = 0.0
    aliases_max: int = 0
    yes_no: float = 0.0
    unreachable: int = 0


class Output(_Model):
    """A parquet file: SHA-256 of its bytes, and of its rows as canonical JSON lines, however parquet writes them."""

    sha256: str
    rows_sha256: str
    rows: int
    sets: dict[str, SetCounts]


class Source(_Model):
    """A file that was read. ``git_blob`` is what git calls it; ``repo`` and ``revision`` are where it was published."""

    name: str
    part: str
    sets: list[str]
    shape: str = ""
    rows: int = 0
    bytes: int
    sha256: str
    git_blob: str
    repo: str = ""
    revision: str = ""


class PromptIdentity(_Model):
    """A prompt: name, SHA-256 of its texts, tokens of the longest one and the model that counted them."""

    name: str
    sha256: str
    longest: int
    model: str | None


class Manifest(_Model):
    """The whole file.

    Attributes:
        format: of this file.
        build: what determines the outputs; a build of the same finds the folder up to date.
        made_with: versions of packages.
        sources: see :class:`Source`.
        outputs: by file name.
        overrides_sha256: of ``overrides.yaml``.
        decontaminated: ids of training questions that an evaluation set asks as well, by set.
        prompt: see :class:`PromptIdentity`.
        licences: of the questions, by set: the licence and where it stands.
    """

    format: int = FORMAT
    build: dict[str, Any]
    made_with: dict[str, str]
    sources: list[Source]
    outputs: dict[str, Output]
    overrides_sha256: str
    decontaminated: dict[str, list[str]]
    prompt: PromptIdentity
    licences: dict[str, list[str]]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder.

    Raises:
        FolderError: there is none, or it is not one of ours; the message names the file and the key.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FolderError(f"{folder}: no {MANIFEST} there; {ADVICE}")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise FolderError(
            f"{path}: {'.'.join(map(str, first['loc'])) or 'not JSON'}: {first['msg']}; {ADVICE}"
        ) from None
    if manifest.format != FORMAT:
        raise FolderError(f"{path}: format {manifest.format} is not read; this version reads {FORMAT}: build it anew")
    return manifest


def changed_files(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Files of a folder that are not as they were written: name -> ``missing`` or ``changed``."""
    digest = {name: output.sha256 for name, output in manifest.outputs.items()}
    found = {}
    for name, wanted in {**digest, OVERRIDES: manifest.overrides_sha256}.items():
        path = folder / name
        if not path.is_file():
            found[name] = "missing"
        elif sha256_of(path) != wanted:
            found[name] = "changed"
    return found


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file.

    Raises:
        FolderError: its schema is not that of our data, or it cannot be read to its end.
    """
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(SCHEMA):
                names = file.schema_arrow.names
                raise FolderError(f"{path}: its columns are {names}, not those of this version's data")
            for batch in file.iter_batches(batch_size=8192):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise FolderError(f"{path}: not a whole parquet file: {reason}; build it anew") from error


def read_overrides(folder: Path) -> dict[str, Any]:
    """``overrides.yaml`` of a folder: Hydra keys and their values, read as Hydra reads YAML.

    Raises:
        FolderError: it is missing, or does not map keys to values.
    """
    path = folder / OVERRIDES
    try:
        told = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise FolderError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(told, dict):
        raise FolderError(f"{path} needs lines of the form key: value, got {type(told).__name__}")
    return {str(key): value for key, value in told.items()}


def check_folder(folder: Path) -> tuple[Manifest, bool]:
    """Check that a folder holds what its manifest says: bytes, schema, rows, unique ids.

    Returns:
        The manifest, and whether ``overrides.yaml`` was edited since, as it may be.

    Raises:
        FolderError: it does not, or ``overrides.yaml`` cannot be read; the message names the file.
    """
    manifest = read_manifest(folder)
    changed = changed_files(folder, manifest)
    edited = changed.get(OVERRIDES) == "changed"
    for name, state in changed.items():
        if not (edited and name == OVERRIDES):
            raise FolderError(
                f"{folder / name} is {state}: it is not the file that {MANIFEST} describes; build it anew"
            )
    read_overrides(folder)
    for name, output in manifest.outputs.items():
        digest, seen = hashlib.sha256(), set()
        for row in rows_of(folder / name):
            digest.update(canonical(row))
            extra = row["extra_info"]
            key = extra["set"], extra["split"], extra["id"]
            if key in seen:
                raise FolderError(f"{folder / name}: two rows have set, split and id {key}")
            seen.add(key)
        if digest.hexdigest() != output.rows_sha256 or len(seen) != output.rows:
            raise FolderError(f"{folder / name}: its {len(seen)} rows are not the {output.rows} of {MANIFEST}")
    return manifest, edited


def table(manifest: Manifest) -> str:
    """What a folder holds, a line for each set, and what was dropped."""
    lines = [
        f"{'part':6}{'set':18}{'rows':>8}{'read':>8}{'aliases':>9}{'max':>5}{'yes/no':>8}{'unreachable':>13}  dropped"
    ]
    for part in PARTS:
        output = manifest.outputs.get(f"{part}.parquet")
        for name, n in (output.sets if output else {}).items():
            dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(n.dropped.items())) or "-"
            share = f"{n.unreachable} ({n.unreachable / n.rows:.1%})" if n.rows else "0"
            lines.append(
                f"{part:6}{name:18}{n.rows:8}{n.read:8}{n.aliases_mean:9.1f}{n.aliases_max:5}{n.yes_no:8.1%}{share:>13}"
                f"  {dropped}"
            )
    if manifest.prompt.longest:
        lines.append(f"longest prompt: {manifest.prompt.longest} tokens by {manifest.prompt.model}")
    lines.append(f"prompt: {manifest.prompt.name}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- two folders
def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys at which two nested mappings differ, each with both values."""
    a, b = dict(_flat(one)), dict(_flat(other))
    return [f"{key}: {a.get(key, '(none)')} | {b.get(key, '(none)')}" for key in {**a, **b} if a.get(key) != b.get(key)]


def compare(one: Path, other: Path) -> list[str]:
    """Why two data folders differ: options and sources, settings, counts of sets, and rows by their ids.

    Returns:
        A line for each difference; empty if there is none.

    Raises:
        FolderError: one of them is no whole data folder.
    """
    (a, _), (b, _) = check_folder(one), check_folder(other)
    lines = difference(_told(a), _told(b))
    lines += difference({"overrides": read_overrides(one)}, {"overrides": read_overrides(other)})
    for name in {**a.outputs, **b.outputs}:
        if name not in a.outputs or name not in b.outputs:
            lines.append(f"{name}: only in {one if name in a.outputs else other}")
        elif a.outputs[name].rows_sha256 != b.outputs[name].rows_sha256:
            lines += _row_differences(name, one / name, other / name)
    return lines


def _told(manifest: Manifest) -> dict[str, Any]:
    """What of a manifest is worth comparing key by key."""
    content = manifest.model_dump()
    seen: Counter[str] = Counter()
    sources = {}
    for source in content["sources"]:
        key = f"{source['part']} {source['name']}"
        seen[key] += 1
        sources[key if seen[key] == 1 else f"{key} #{seen[key]}"] = source
    outputs = {name: {"sets": output["sets"]} for name, output in content["outputs"].items()}
    build = {key: value for key, value in content["build"].items() if key != "sources"}
    return {"build": build, "sources": sources, "outputs": outputs, "prompt": content["prompt"]}


def _row_differences(name: str, one: Path, other: Path) -> list[str]:
    def by_id(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
        rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for row in rows_of(path):
            extra = row["extra_info"]
            rows[extra["set"], extra["split"], extra["id"]] = row
        return rows

    a, b = by_id(one), by_id(other)
    lines = []
    for where, keys in ((one, a.keys() - b.keys()), (other, b.keys() - a.keys())):
        if keys:
            shown = ", ".join("/".join(key) for key in sorted(keys)[:5])
            lines.append(f"{name}: {len(keys)} rows only in {where}: {shown}{', …' if len(keys) > 5 else ''}")
    fields: dict[str, list[tuple[str, ...]]] = {}
    for key in sorted(a.keys() & b.keys()):
        for field in difference(a[key], b[key]):
            fields.setdefault(field.partition(":")[0], []).append(key)
    lines += [f"{name}: {field} differs in {len(keys)} rows: {'/'.join(keys[0])}, …" for field, keys in fields.items()]
    return lines or [f"{name}: the same rows in another order"]
