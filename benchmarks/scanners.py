"""Seconds to read 200 kB of the worst texts, and how much longer a plain expression takes.

    python benchmarks/scanners.py [--kilobytes 200] [--former 20]

Every scanner of text that a model writes or a passage holds reads repetitions of tags, brackets, quotes and marks; the
slowest three are shown. ``growth`` is the time for twice the text, 2 where it is linear. A lazy expression takes the
square of the length: it reads ``--former`` kB, and its time is scaled. ``ratio`` is its time to ours on the same text.
Processor time, the best of three.
"""

from __future__ import annotations

import argparse
import re
import time
import unicodedata
from collections.abc import Callable
from typing import Any

from verl.tools.control_tokens import _CONTROL, neutralise
from verl.trainer.siop.rollouts.tool_calls import faults
from verl.utils.reward_score.siop_reward import last_assistant_text
from verl.utils.siop.credit.answers import f1_release
from verl.utils.siop.nli_clustering import normalize_answer, plain_form
from verl.utils.siop.turn_utils import parse_answer, parse_queries

TAGS = ["think", "answer", "tool_call", "tool_response"]
UNITS = [
    *(f"<{tag}>" for tag in TAGS),
    *(f"</{tag}>" for tag in TAGS),
    *(f"<{tag}></{tag}>" for tag in TAGS),
    *(f"</{tag}><{tag}>" for tag in TAGS),
    *(f"<{one}><{other}>" for one in TAGS for other in TAGS if one != other),
    *("<answer><answer>x</answer>", "<tool_call>{", '<tool_call>{"a":1}', '"name" ', "```json", "<", "&", "&#38", "["),
    *("<|", "<" + " " * 250 + ">", "< / ", "[|" + "a" * 200 + "]", "<a" + "." * 240, "]~b", "assistant \t", "\n"),
    *('"', "'", '"a ', "'a ", "'a", "'\"", "!", "?!a", " ,", "\u0301\u0316", "a\u0301\u0316", "ﾞ", "ß", "a", " "),
]
SEARCH = {"search": ["query"]}
SCANNERS: dict[str, Callable[[str], Any]] = {
    "parse_answer": parse_answer,
    "parse_queries": parse_queries,
    "last_assistant_text": last_assistant_text,
    "faults": lambda text: faults(text, 0, "hermes", SEARCH),
    "neutralise": neutralise,
    "f1_release": lambda text: f1_release(text, ["x"]),
    "plain_form": plain_form,
    "normalize_answer": normalize_answer,
}


def _lazy(pattern: str) -> Callable[[str], Any]:
    return re.compile(pattern, re.DOTALL).findall


# A plain way to do the same: the text that is worst for it, and the power of the length with which its time grows.
_WIDE = "<" + " " * 250 + ">"
_SHARED = re.compile(_CONTROL.pattern.replace(r"\s*(?:/\s*)?", r"\s*/?\s*"), _CONTROL.flags)
PLAIN: dict[str, tuple[str, Callable[[str], Any], int]] = {
    "parse_answer": ("<think>", _lazy("<think>.*?</think>"), 2),
    "parse_queries": ("<tool_call>", _lazy("<tool_call>(.*?)</tool_call>"), 2),
    "f1_release": ("<answer>", _lazy("<answer>(.*?)</answer>"), 2),
    # Two runs of white space that may share the same characters, in candidates of 252 characters.
    "neutralise": (_WIDE, lambda text: [_SHARED.fullmatch(text[i : i + 252]) for i in range(0, len(text), 252)], 1),
    "plain_form": ("\u0301\u0316", lambda text: unicodedata.normalize("NFC", text), 2),
}


def seconds(function: Callable[[str], Any], text: str) -> float:
    """Processor time of one call, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        function(text)
        best = min(best, time.process_time() - start)
    return best


def repeated(unit: str, kilobytes: float) -> str:
    size = int(kilobytes * 1000)
    return (unit * (size // len(unit) + 1))[:size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kilobytes", type=float, default=200)
    parser.add_argument("--former", type=float, default=20)
    args = parser.parse_args()
    print(f"{'':<20} {'text of':<16} {'s':>8} {'growth':>7} {'ratio':>8}")
    for name, scan in SCANNERS.items():
        times = {unit: seconds(scan, repeated(unit, args.kilobytes)) for unit in UNITS}
        for unit in sorted(times, key=lambda unit: -times[unit])[:3]:
            twice = seconds(scan, repeated(unit, 2 * args.kilobytes)) / times[unit]
            print(f"{name:<20} {repr(unit)[:16]:<16} {times[unit]:8.4f} {twice:7.1f}")
        if name in PLAIN:
            unit, plain, power = PLAIN[name]
            former = seconds(plain, repeated(unit, args.former)) * (args.kilobytes / args.former) ** power
            ratio = former / seconds(scan, repeated(unit, args.kilobytes))
            print(f"{'  plain expression':<20} {repr(unit)[:16]:<16} {former:8.1f} {2**power:7} {ratio:8.0f}")


if __name__ == "__main__":
    main()
