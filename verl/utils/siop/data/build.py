"""Builds a data folder: reads, drops, de-duplicates, decontaminates, samples, writes; all of it or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from tqdm import tqdm
from verl.utils.siop.data.chat import build_tools
from verl.utils.siop.data.fit import Fit, fit, load_chat
from verl.utils.siop.data.manifest import (
    MANIFEST,
    OVERRIDES,
    FolderError,
    Manifest,
    Output,
    PromptIdentity,
    SetCounts,
    Source,
    changed_files,
    difference,
    read_manifest,
)
from verl.utils.siop.data.presets import LICENCES, Preset, preset_of
from verl.utils.siop.data.prompts import PROMPTS, Prompt, overrides, overrides_text, prompt_of
from verl.utils.siop.data.rows import SCHEMA, answer_type, canonical, question_key, reachable, row_of
from verl.utils.siop.data.select import Options, Part, find_files, leave_out, read_parts
from verl.utils.siop.data.sources import SourceError, SourceFile, digests
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.files import put_in_place, sha256_of, workplace

VERSION = 2  # raise it when the same options would build something else than before
TOOLS = "config/local_search_tool_config.yaml"  # those of a run that names none
SHOWN_ROWS = 5000  # more rows get a progress bar


# ---------------------------------------------------------------------- what to write
def _rows(part: Part, prompt: Prompt, options: Options, labelled: bool) -> Iterator[dict[str, Any]]:
    first: dict[str, tuple[int, str]] = {}
    questions = [question for questions in part.questions.values() for question in questions]
    for index, question in enumerate(tqdm(questions, desc="write rows", disable=len(questions) < SHOWN_ROWS)):
        at, earlier = first.setdefault(question_key(question.text), (index, f"{question.set}/{question.id}"))
        duplicate_of = None if at == index else earlier
        messages = prompt.messages(question.text)
        yield row_of(question, index, messages, labelled, options.max_alias_words, duplicate_of)


def _counts(part: Part, max_words: int) -> dict[str, SetCounts]:
    counts = {}
    for name, questions in part.questions.items():
        labelled = [question.aliases for question in questions if question.aliases]
        most = max(len(labelled), 1)
        counts[name] = SetCounts(
            read=part.read[name],
            dropped=dict(sorted(part.dropped[name].items())),
            rows=len(questions),
            aliases_mean=round(sum(map(len, labelled)) / most, 4),
            aliases_max=max(map(len, labelled), default=0),
            yes_no=round(sum(answer_type(aliases) == "yes_no" for aliases in labelled) / most, 4),
            unreachable=sum(not reachable(aliases, max_words) for aliases in labelled),
        )
    return counts


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> tuple[int, str]:
    """Number of rows, and SHA-256 of them as canonical JSON lines."""
    digest, count = hashlib.sha256(), 0
    with pq.ParquetWriter(path, SCHEMA) as writer:
        while batch := [row for _, row in zip(range(8192), rows, strict=False)]:
            for row in batch:
                digest.update(canonical(row))
            writer.write_table(pa.Table.from_pylist(batch, SCHEMA))
            count += len(batch)
    return count, digest.hexdigest()


@contextlib.contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    try:
        with workplace(out) as place:
            yield place
    except OSError as error:
        raise FolderError(f"{out} cannot be written: {error}; what was there is unchanged") from error


# ---------------------------------------------------------------------- all of it
def choose_prompt(options: Options) -> tuple[Prompt, Fit | None]:
    """The prompt, and how it fits the model if one is named.

    Raises:
        SiopConfigError: neither a prompt nor a model is named, or the two do not fit.
    """
    chosen = prompt_of(options.prompt) if options.prompt else None
    tools = options.tool_config or (TOOLS if Path(TOOLS).is_file() else None)
    if options.model and tools is None:
        raise SiopConfigError(
            f"--model {options.model}: name its tools with --tool-config FILE; there is no {TOOLS} here"
        )
    if options.tool_config:
        build_tools(OmegaConf.create({"tool_config_path": options.tool_config}))
    if options.model:
        fitted = fit(load_chat(options.model, tools), chosen)
        return fitted.prompt, fitted
    if chosen is None:
        raise SiopConfigError(
            f"name the model that will read the prompts (--model ID), or --prompt: {', '.join(PROMPTS)}"
        )
    return chosen, None


def _source(file: SourceFile) -> Source:
    sha256, blob = digests(file.path)
    sets, size = list(file.wanted) or [file.set], file.path.stat().st_size
    source = Source(name=file.name, part=file.part or "by split", sets=sets, bytes=size, sha256=sha256, git_blob=blob)
    return source.model_copy(update=file.origin)


def _described(options: Options, sources: list[Source], prompt: Prompt, fitted: Fit | None) -> dict[str, Any]:
    """What determines a build; of a build of equal description there is nothing to do."""
    names = ("preset", "train", "eval", "train_per_set", "eval_per_set", "seed", "question_mark", "dedupe",
             "decontaminate", "max_alias_words", "label_free", "tool_config")  # fmt: skip
    described = {name: getattr(options, name) for name in names}
    # By their places: two may have one name, and the rows stand in this order.
    read = {
        f"{i} {source.part} {','.join(source.sets)} {source.name}": source.sha256 for i, source in enumerate(sources)
    }
    model = fitted.identity() if fitted else None
    return {"version": VERSION, **described, "sources": read, "prompt_sha256": prompt.sha256, "model": model}


def _is_built(out: Path, wanted: dict[str, Any], force: bool) -> bool:
    """Whether the folder holds this build already.

    Raises:
        FolderError: it holds something else, which a build would destroy.
    """
    if force or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    advice = "choose another --out, or replace it with --force"
    try:
        manifest = read_manifest(out)
    except FolderError as error:
        raise FolderError(f"{error}; {advice}") from error
    if differs := difference(manifest.build, wanted):
        raise FolderError(f"{out} holds other data: {'; '.join(differs[:4])} (there | asked for); {advice}")
    changed = changed_files(out, manifest)
    if edited := [name for name, state in changed.items() if state == "changed"]:
        raise FolderError(f"{out / edited[0]} was changed after it was built; keep it and do not build, or {advice}")
    built = {MANIFEST, OVERRIDES, *manifest.outputs}
    if changed and (foreign := sorted(path.name for path in out.iterdir() if path.name not in built)):
        raise FolderError(
            f"{out} lacks {', '.join(changed)}, and building it anew would delete {', '.join(foreign[:4])}, which is "
            f"none of its files: move that away, {advice}"
        )
    return not changed


def build(options: Options) -> Manifest | None:
    """Build a data folder.

    Args:
        options: see :class:`Options`.

    Returns:
        Its manifest; None if the folder was up to date.

    Raises:
        SiopConfigError: an option is wrong.
        SourceError: the questions cannot be had; names file and line.
        FolderError: the folder holds something else, or cannot be written; what was there is unchanged.
        InUse: another process builds it.
    """
    prompt, fitted = choose_prompt(options)
    files = find_files(options)
    sources = [_source(file) for file in files]
    wanted = json.loads(json.dumps(_described(options, sources, prompt, fitted)))
    out = Path(os.path.realpath(options.out))
    with _workplace(out) as place:
        if _is_built(out, wanted, options.force):
            return None
        parts, contaminated = _choose(options, files, sources)
        new = place / "new"
        new.mkdir()
        manifest = _write(
            new, options, parts, prompt, fitted, build=wanted, sources=sources, decontaminated=contaminated
        )
        put_in_place(new, out)
    return manifest


def _choose(
    options: Options, files: list[SourceFile], sources: list[Source]
) -> tuple[dict[str, Part], dict[str, list[str]]]:
    """The questions to write, and those that are left out for being in an evaluation; ``sources`` learn their rows."""
    parts, readings = read_parts(options, files)
    for file, source, reading in zip(files, sources, readings, strict=True):
        source.shape, source.rows = reading.shape, reading.rows
        if digests(file.path)[0] != source.sha256:
            raise SourceError(f"{file.path} was changed while it was read; build again when it is whole")
    return parts, leave_out(parts, options, preset_of(options.preset) if options.preset else None)


def _write(
    folder: Path, options: Options, parts: dict[str, Part], prompt: Prompt, fitted: Fit | None, **told: Any
) -> Manifest:
    """All files of a data folder; ``told`` is what else its manifest says."""
    questions = [question.text for part in parts.values() for each in part.questions.values() for question in each]
    longest = fitted.longest(questions) if fitted else 0
    outputs = {}
    for key, part in parts.items():
        if not part.questions:
            continue
        name = f"{key}.parquet"
        labelled = key == "eval" or not options.label_free
        count, rows_sha256 = _write_parquet(folder / name, _rows(part, prompt, options, labelled))
        sets = _counts(part, options.max_alias_words)
        outputs[name] = Output(sha256=sha256_of(folder / name), rows_sha256=rows_sha256, rows=count, sets=sets)
    settings = overrides(prompt, longest, options.tool_config)
    text = overrides_text(settings, f"Made by python -m verl.utils.siop.data build; prompt {prompt.name}.")
    (folder / OVERRIDES).write_text(text, encoding="utf-8")
    names = {name for part in parts.values() for name in part.questions}
    manifest = Manifest(
        made_with={name: importlib.metadata.version(name) for name in ("siop-verl", "pyarrow")},
        outputs=outputs,
        overrides_sha256=hashlib.sha256(text.encode()).hexdigest(),
        prompt=PromptIdentity(name=prompt.name, sha256=prompt.sha256, longest=longest, model=options.model),
        licences={name: list(LICENCES[name]) for name in sorted(names & LICENCES.keys())},
        **told,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def surprises(manifest: Manifest, preset: Preset | None) -> list[str]:
    """What a reader of results has to know about the data, a line each: another file than the published one."""
    lines = []
    for source in manifest.sources:
        known = (preset.blobs or {}).get(source.name.rpartition(".")[0]) if preset else None
        if known and not source.git_blob.startswith(known):
            lines.append(
                f"{source.name} is not the published file (git blob {source.git_blob[:8]}, {known} is known): "
                "results on it do not compare"
            )
    return lines
