"""Where the question sets of the literature are published, which parts of them are used, and under what licence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from verl.utils.siop.errors import SiopConfigError

PARTS = ("train", "eval")

# Names of the same set elsewhere; ours are those of FlashRAG.
SET_NAMES = {"tq": "triviaqa", "trivia_qa": "triviaqa", "2wiki": "2wikimultihopqa", "hotpot": "hotpotqa"}


@dataclass(frozen=True)
class Preset:
    """The parts of a publication that make a training set and an evaluation set.

    Args:
        name: for ``--preset``.
        host: ``hub`` (a data set repository of the Hugging Face hub) or ``github``.
        repo: ``owner/name`` there.
        train: for each set the file that holds it, without its extension; several sets may share one file.
        eval: the same for the evaluation.
        suffix: extension of the published files.
        whole: the evaluation is one file that results stand on: no row of it is dropped.
        blobs: for a file its git blob (SHA-1), where the published one is known.
        revision: branch, tag or commit if none is named.
    """

    name: str
    host: str
    repo: str
    train: Mapping[str, str]
    eval: Mapping[str, str]
    suffix: str
    whole: bool = False
    blobs: Mapping[str, str] | None = None
    revision: str = "main"

    def files(self, part: str) -> Mapping[str, str]:
        """The file of each set of ``train`` or ``eval``."""
        return self.train if part == "train" else self.eval


_SEVEN = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")

PRESETS = {
    preset.name: preset
    for preset in (
        # Training and evaluation of Search-R1 (arXiv 2503.09516): NQ and HotpotQA, seven full sets.
        Preset(
            "searchr1",
            "hub",
            "RUC-NLPIR/FlashRAG_datasets",
            train={"nq": "nq/train", "hotpotqa": "hotpotqa/train"},
            eval={
                "nq": "nq/test",
                "triviaqa": "triviaqa/test",
                "popqa": "popqa/test",
                "hotpotqa": "hotpotqa/dev",
                "2wikimultihopqa": "2wikimultihopqa/dev",
                "musique": "musique/dev",
                "bamboogle": "bamboogle/test",
            },
            suffix=".jsonl",
        ),
        # DeepResearcher (arXiv 2504.03160): 6 x 512 + 125 questions, on which IGPO and SIOP report as well.
        Preset(
            "deepresearcher",
            "github",
            "GAIR-NLP/DeepResearcher",
            train=dict.fromkeys(("nq", "triviaqa", "hotpotqa", "2wikimultihopqa"), "data/train"),
            eval=dict.fromkeys(_SEVEN, "data/test"),
            suffix=".parquet",
            whole=True,
            blobs={"data/test": "9e2bf1f2"},
        ),
    )
}

# Of the questions; where a collection has a licence of its own, it is named in docs/data.md.
LICENCES = {
    "nq": ("CC BY-SA 3.0", "https://ai.google.com/research/NaturalQuestions"),
    "triviaqa": ("Apache 2.0 (the questions belong to their authors)", "https://nlp.cs.washington.edu/triviaqa/"),
    "popqa": ("MIT", "https://github.com/AlexTMallen/adaptive-retrieval"),
    "hotpotqa": ("CC BY-SA 4.0", "https://hotpotqa.github.io/"),
    "2wikimultihopqa": ("Apache 2.0", "https://github.com/Alab-NII/2wikimultihop"),
    "musique": ("CC BY 4.0", "https://github.com/StonyBrookNLP/musique"),
    "bamboogle": ("MIT", "https://github.com/ofirpress/self-ask"),
}


def preset_of(name: str) -> Preset:
    """The preset of this name.

    Raises:
        SiopConfigError: there is none.
    """
    if name not in PRESETS:
        raise SiopConfigError(f"--preset {name} is not allowed; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
