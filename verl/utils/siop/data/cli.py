"""Command line of the data package: build, fetch, check, show, diff.

Exit status: 0; 1 if ``diff`` finds a difference; 2 after an error; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path

from pydantic import ValidationError
from verl.utils.siop.data.build import TOOLS, build, surprises
from verl.utils.siop.data.fit import fit, load_chat
from verl.utils.siop.data.manifest import (
    OVERRIDES,
    FolderError,
    Manifest,
    check_folder,
    compare,
    read_manifest,
    read_overrides,
    rows_of,
    table,
)
from verl.utils.siop.data.presets import PARTS, PRESETS, preset_of
from verl.utils.siop.data.prompts import PROMPTS, ROLLOUT, Prompt, prompt_of
from verl.utils.siop.data.select import Options
from verl.utils.siop.data.sources import fetch
from verl.utils.siop.errors import SiopConfigError, SiopError

EXAMPLES = """\
  build --preset searchr1 --model Qwen/Qwen3-4B --out data/searchr1
  build --preset deepresearcher --source ~/DeepResearcher --model Qwen/Qwen3-4B --out data/deepresearcher
  build --source train=mine.jsonl eval:mine=held_out.json --prompt hermes-instruct --out data/mine
  check data/searchr1
  show data/searchr1 --row 3 --model Qwen/Qwen3-4B
  diff data/searchr1 data/searchr1-seed2
"""


def say(text: str) -> None:
    """A line for people."""
    sys.stdout.write(text + "\n")


def _whole(low: int) -> argparse._ActionType:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: a whole number from {low} on")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.siop.data",
        description="Question sets as data for training and evaluation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("build", help="make a data folder; up to date if nothing changed")
    _add_build(making)
    fetching = actions.add_parser("fetch", help="download a preset's files into the cache (HF_HOME)")
    fetching.add_argument("--preset", choices=list(PRESETS), required=True)
    fetching.add_argument("--revision", help="branch, tag or commit")
    checking = actions.add_parser("check", help="is a folder what its manifest says, and what is wrong with its labels")
    checking.add_argument("dir", type=Path)
    showing = actions.add_parser("show", help="a row as a model will see it, with its tokens")
    showing.add_argument("dir", type=Path)
    showing.add_argument("--row", type=_whole(0), default=0, help="from 0 (default)")
    showing.add_argument("--part", choices=PARTS, help="(default: train where it is there)")
    showing.add_argument("--model", required=True, help="its chat template renders the row: folder or hub id")
    showing.add_argument("--tool-config", help=f"(default: the folder's, else {TOOLS})")
    comparing = actions.add_parser("diff", help="why two folders differ; exit status 1 if they do")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add(
        "--preset",
        choices=list(PRESETS),
        help="searchr1: NQ + HotpotQA, seven full sets; deepresearcher: its 3,197 questions",
    )
    add(
        "--source",
        nargs="+",
        default=["hub"],
        metavar="SOURCE",
        help="hub (default), a folder of the same layout, or files: PATH, train=PATH, eval=PATH, eval:SET=PATH",
    )
    add("--revision", help="branch, tag or commit of the published files")
    for part in PARTS:
        add(f"--{part}", default="all", metavar="SETS", help="all (default), none, or names as nq,hotpotqa")
        add(
            f"--{part}-per-set",
            type=_whole(0),
            default=0,
            metavar="N",
            help="questions sampled of each set (default 0: all)",
        )
    add("--seed", type=_whole(0), default=1, help="of the sampling (default: 1)")
    add("--model", help="the model that will read the prompts: chooses and proves them, counts tokens")
    add("--prompt", help=f"{', '.join(PROMPTS)}, or FILE.yaml (default: what --model asks for)")
    add("--tool-config", help=f"tools in verl's format (default: those of the run, {TOOLS})")
    add("--question-mark", choices=("keep", "add"), default="keep", help="add: a '?' where a question ends without")
    add("--dedupe", choices=("pair", "off"), default="pair", help="pair (default): one of equal question and aliases")
    add(
        "--decontaminate",
        choices=("exact", "off"),
        default="exact",
        help="exact (default): no evaluation question in the training",
    )
    add(
        "--max-alias-words",
        type=_whole(1),
        default=10,
        metavar="N",
        help="a label is reachable if an alias has at most N words (default: 10)",
    )
    add("--label-free", action="store_true", help="no labels in the training data; those of the evaluation stay")
    add("--force", action="store_true", help="replace what is in the folder")  # fmt: skip


def _built(manifest: Manifest) -> None:
    say(table(manifest))
    for line in surprises(manifest, PRESETS.get(str(manifest.build.get("preset")))):
        say(f"note: {line}")


def _build(args: argparse.Namespace) -> int:
    options = {name: value for name, value in vars(args).items() if name != "action"}
    options["source"] = tuple(args.source)
    if args.tool_config:  # a run starts elsewhere
        options["tool_config"] = os.path.abspath(args.tool_config)
    manifest = build(Options(**options))
    if manifest is None:
        say(f"{args.out} is up to date")
        return 0
    _built(manifest)
    if args.prompt and not prompt_of(args.prompt).asks_for_tags:
        say(
            f"note: the prompt {args.prompt} does not ask for <answer> and </answer>: an answer outside of them is not "
            "read, so the model must have learnt to give it in them"
        )
    say(f"wrote {args.out}; use it with DATA_DIR={args.out}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    preset = preset_of(args.preset)
    folder, origin = fetch(preset, [*preset.train.values(), *preset.eval.values()], args.revision)
    say(f"{preset.name} at {origin['revision']} is in {folder}")
    return 0


def _check(args: argparse.Namespace) -> int:
    manifest, edited = check_folder(args.dir)
    _built(manifest)
    if edited:
        say(f"note: {args.dir / OVERRIDES} was edited after it was built; a run takes the settings that it has now")
    say(f"{args.dir} is as it was built{f', but for {OVERRIDES}' if edited else ''}")
    return 0


def _show(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.dir)
    names = [f"{part}.parquet" for part in PARTS if f"{part}.parquet" in manifest.outputs]
    if not names:
        raise FolderError(f"{args.dir}: its manifest names no parquet file; build it anew")
    name = f"{args.part}.parquet" if args.part else names[0]
    if name not in names:
        raise SiopConfigError(f"--part {args.part}: {args.dir} has {', '.join(names)}")
    row = next(itertools.islice(rows_of(args.dir / name), args.row, None), None)
    if row is None:
        raise SiopConfigError(f"--row {args.row}: {args.dir / name} has rows 0 to {manifest.outputs[name].rows - 1}")
    told = read_overrides(args.dir)
    tools = args.tool_config or told.get(f"{ROLLOUT}.tool_config_path") or TOOLS
    try:
        prompt = Prompt(name=OVERRIDES, template_kwargs=told.get("data.apply_chat_template_kwargs") or {})
    except ValidationError as error:
        raise FolderError(
            f"{args.dir / OVERRIDES}: data.apply_chat_template_kwargs: {error.errors()[0]['msg']}"
        ) from error
    chat = fit(load_chat(args.model, tools), prompt).chat
    schemas, messages = chat.schemas(), row["prompt"]
    count, bare = len(chat.prompt_ids(messages, schemas)), len(chat.prompt_ids(messages, []))
    question = len(chat.tokenizer(row["extra_info"]["question"], add_special_tokens=False)["input_ids"])
    say(chat.render(messages, True, schemas))
    say(f"--- row {args.row} of {args.dir / name}: {row['extra_info']}, label {row['reward_model']['ground_truth']}")
    parts = f"{count - bare} of the tools {', '.join(chat.tools)}, {question} of the question"
    say(f"--- {count} tokens: {parts}; format {chat.format}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    lines = compare(args.a, args.b)
    for line in lines:
        say(line)
    say(f"{args.a} and {args.b} differ" if lines else f"{args.a} and {args.b} hold the same")
    return int(bool(lines))


def main(argv: list[str] | None = None) -> int:
    """Run one action; see the module."""
    args = _parser().parse_args(argv)
    actions = {"build": _build, "fetch": _fetch, "check": _check, "show": _show, "diff": _diff}
    try:
        return actions[args.action](args)
    except (SiopError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; no folder is left half written\n")
        return 130
