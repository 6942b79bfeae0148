"""Clusters of answers by meaning: normalisation, NLI label look-up, equivalence rules and the greedy pass.

Pure functions; the NLI model that predicts the labels lives behind the scorer.
Source of the greedy pass and of the rules: semantic entropy (Kuhn et al., arXiv 2302.09664).
"""

from __future__ import annotations

import html
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from verl.utils.siop.errors import SiopConfigError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

# With the semicolon: "AT&T" and "R&D" are no entities. Bounded: int() refuses thousands of digits.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
# Ligatures, small, full and half width. NFKC of everything would make 10² into 102.
_PRESENTATION = re.compile("[\ufb00-\ufb06\ufe50-\ufe6f\uff00-\uffef]+")
# ⁻5, not 10⁻5.
_SUPERSCRIPT_MINUS = re.compile(r"(?<!\S)\u207b(?=\d)")
# What no letter begins. Longer runs of combining marks are cut, since sorting them takes the square of their number
# (Unicode's stream-safe form, UAX 15).
_MARKS = re.compile("[^\\w\\s!-~\u034f]{30}(?!\u034f)")
_UNIFIED = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
    | dict.fromkeys("“”„‟«»「」『』〝〞〟", '"')
    | dict.fromkeys("‘’‚‛‹›´ʼʻ", "'")
    | {"…": "..."}
    # Soft hyphen, zero-width space, direction marks, word joiner, byte order mark.
    | dict.fromkeys("\u00ad\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff", "")
    # Arabic letter mark, Mongolian and other variation selectors: the same character, drawn in another way.
    | dict.fromkeys("\u061c\u180b\u180c\u180d\u180e\u180f" + "".join(map(chr, range(0xFE00, 0xFE10))), "")
)
# An opening quote begins a word or a phrase. All others may be apostrophes, primes, feet or inches: those of 5'10", f''
# and (A ∪ B)'. Each takes linear time: no opening quote is looked for inside of what an earlier one has run through.
_OPENS = r"(?<![^\s(\[{<,;:/=、。-])"
_DOUBLE_QUOTED = re.compile(rf'{_OPENS}"(?:(?<=^")|(?=\S))([^"]*)"(?!\w)')
_SINGLE_QUOTED = re.compile(rf"{_OPENS}'(?:(?<=^')|(?=\S))((?:[^']|(?<=\w)'(?=\w))*)'(?!\w)")
# Quotes of two strokes, as TeX has them. Others are double primes, those of 5'' inches; after a word they stay as they
# are: sin'' is not sin with half a pair of quotes.
_TWO_STROKES = re.compile(rf"{_OPENS}''(?=[^\s'])((?:[^']|'(?!'))*)''(?!\w)")
_DOUBLE_PRIME = re.compile(r"''(?<![^\W\d_]{2}'')")
# Whose other half is missing: before a word, or after one (xy" is not y").
_STRAY_QUOTE = re.compile(rf"{_OPENS}['\"]+(?=[^\s'\"])|(?<=[^\W\d_]{{2}})([.,;:!?]*)\"+(?![\w(\"])")
_ARTICLE = ("an", "the")
_LEADING_ARTICLE = re.compile(rf"^(?:(?:{'|'.join(_ARTICLE)}) )+(?=[^\W_])")
# After a number: m and M, mW and MW, Gb and GB. No unit: pm and PM, May.
_UNIT = re.compile(
    r"(?<=\d)( [a-zA-Z]| ?(?:[a-z]{1,2}[A-Z]|[a-z][A-Z][a-zA-Z]|[A-Z][a-z][A-Z]?|[A-Z]{2}[a-z]))(?!\w|[.'&-]\w)"
)
_END_OF_WORD = ".,;:。、।॥۔،؛"
# Stand next to words without being part of them.
_BETWEEN_WORDS = str.maketrans(dict.fromkeys("()[]{}—", " "))
_QUESTION = "!?؟"
_NUMBER_BEFORE, _NUMBER_AFTER = r"[\d\u00bc-\u00be\u2150-\u215e]", r"[^\w\s]*[\d\u00bc-\u00be\u2150-\u215e]"
_DATE = re.compile(
    r"\b((?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.? \d{1,2}) ?, (?=\d{4}(?!\d))"
)
_BETWEEN_NUMBERS = re.compile(rf"(?<={_NUMBER_BEFORE}) ?([{_END_OF_WORD}]+) (?={_NUMBER_AFTER})")
_LONE_COMMA = re.compile(rf"(?<!\S)[,;،؛](?!\S)(?:(?<!{_NUMBER_BEFORE} .)|(?! {_NUMBER_AFTER}))")
# How often the form is taken of a form, at most: what it drops may uncover more to drop, as quotes inside of quotes do.
# A text longer than any answer is a passage, and its form is taken once.
_TIMES, _LONG = 8, 2000


def normalize_answer(text: str) -> str:
    """Normal form of an answer: lower case, no ASCII punctuation, no articles, single spaces (SQuAD v1.1 evaluation).

    >>> normalize_answer("  The Eiffel-Tower! ")
    'eiffeltower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def plain_form(text: str) -> str:
    """Normal form in which two texts are the same text, whoever typed them; the SQuAD one merges −5 with 5.

    Unified: HTML entities, Unicode forms (NFC, ligatures, full width), quotes, dashes, white space, case. Dropped:
    invisible characters, quotes around words, ``.,;:`` at the end of a word, ``!`` and ``?`` at the end of a word of
    letters, commas that stand alone, ``the`` or ``an`` before the first word. All else stays, so that what differs in a
    sign, in a decimal point or in a symbol differs here: −5 and 5, .5 and 5, 3.5 and 35, .33… and .33, 5! and 5, 5% and
    5, $5 and €5, C++ and C#, f' and f'', 10² and 102, 1/2 and 12, vitamin A and vitamin. So does ``a``, which may be an
    option, a key, a blood group: A and B, A negative. Between two numbers ``.,;:`` stays, but for the comma of a date
    with a month's English name: “1, 1/2” and 1 1/2, “3: 5” and “3, 5”. A letter or a unit of small and capital letters
    after a number keeps its case: 5 mW and 5 MW. Empty only for text of invisible characters, empty quotes and lone
    commas.

    The form of a form is itself, unless more is nested in each other than in any answer that people write. Takes time
    linear in the length of the text.

    >>> plain_form("  The &ldquo;AT&amp;T&rdquo; Building,\u00a0Z\u0075\u0308rich! ")
    'at&t building zürich'
    >>> plain_form("−3.5"), plain_form("C++.")
    ('-3.5', 'c++')
    """
    for _ in range(_TIMES if len(text) <= _LONG else 1):
        before, text = text, _simplified(text)
        if text == before:
            break
    return text


def _simplified(text: str) -> str:
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    if not text.isascii():
        text = _PRESENTATION.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
        text = unicodedata.normalize("NFC", _MARKS.sub("\\g<0>\u034f", text)).translate(_UNIFIED)
        text = _SUPERSCRIPT_MINUS.sub("-", text)
    text = " ".join(text.split())
    text = "".join(part if place % 2 else part.casefold() for place, part in enumerate(_UNIT.split(text)))
    text = text.replace("`", "'")
    if "'" in text or '"' in text:
        text = _DOUBLE_PRIME.sub('"', _TWO_STROKES.sub(r'"\1"', text))
        # Of two pairs around a word the outer one first.
        for quoted in (_SINGLE_QUOTED, _DOUBLE_QUOTED, _SINGLE_QUOTED):
            text = quoted.sub(r"\1", text)
        text = " ".join(_STRAY_QUOTE.sub(r"\1", text).split())
    text = _LEADING_ARTICLE.sub("", text)
    text = _LONE_COMMA.sub("", _BETWEEN_NUMBERS.sub(r" \1 ", _DATE.sub(r"\1 ", text)))
    first, *rest = text.split() or [""]
    bare = _without_end(first)
    # "The, x" would become "the x", and that x.
    return " ".join([first if rest and bare in _ARTICLE else bare, *map(_without_end, rest)])


def _without_end(word: str) -> str:
    """The word without the punctuation of a sentence after it; punctuation alone stays."""
    core = word.rstrip(_END_OF_WORD + _QUESTION)
    if len(core) < 2 or not core[-2:].isalpha():  # 5! and n! are numbers, e4? is a move
        core = word.rstrip(_END_OF_WORD)
        if core[-1:].isnumeric() and ".." in word[len(core) :]:  # 0.333... goes on
            core = word.rstrip(_END_OF_WORD.replace(".", ""))
    return core or word


def _label_index(id2label: Mapping[int, str], stem: str) -> int:
    matches = [int(index) for index, label in id2label.items() if str(label).lower().startswith(stem)]
    if len(matches) != 1:
        raise SiopConfigError(
            f"the NLI model's id2label must have exactly one label that starts with '{stem}' (any case), "
            f"it has {len(matches)}: {dict(id2label)}"
        )
    return matches[0]


def entailment_index(id2label: Mapping[int, str]) -> int:
    """Index of the entailment label of an NLI model.

    Args:
        id2label: the model's ``config.id2label``; keys may be strings, as in JSON.

    Raises:
        SiopConfigError: not exactly one label starts with ``entail`` (any case).
    """
    return _label_index(id2label, "entail")


def label_indices(id2label: Mapping[int, str]) -> tuple[int, int, int]:
    """Indices of (entailment, neutral, contradiction), for the loose rule.

    Raises:
        SiopConfigError: a label is missing or ambiguous, as in models with two labels.
    """
    return entailment_index(id2label), _label_index(id2label, "neutral"), _label_index(id2label, "contradict")


def strict_equivalent(forward: int, backward: int, entailment: int) -> bool:
    """Equivalent if each answer entails the other.

    Args:
        forward, backward: index of the most probable label for (a, b) and for (b, a).
        entailment: index of the entailment label.
    """
    return forward == entailment and backward == entailment


def loose_equivalent(forward: int, backward: int, labels: tuple[int, int, int]) -> bool:
    """Equivalent if neither direction contradicts and not both are neutral.

    Args:
        forward, backward: index of the most probable label for (a, b) and for (b, a).
        labels: the indices of (entailment, neutral, contradiction), see :func:`label_indices`.
    """
    _, neutral, contradiction = labels
    return contradiction not in (forward, backward) and not forward == backward == neutral


def identity_key(answer: str) -> str:
    """What answers share that are equivalent without asking a model: :func:`plain_form`.

    Merging is for good, since no model is asked; keeping apart is not. So only what is the same text is the same here:
    1,000 and 1000, or USA and U.S.A., are for the model. An answer of which nothing is left stands for itself.
    """
    return plain_form(answer) or answer.strip()


def words(text: str) -> str:
    """The plain form of a text with a space on either side, brackets and long dashes being spaces too."""
    return f" {plain_form(text.translate(_BETWEEN_WORDS))} "


def mentions(text_words: str, answer: str) -> bool:
    """Whether a text holds the answer's words in a row, as whole words of the plain form.

    Args:
        text_words: :func:`words` of the text.
        answer: of punctuation and articles alone it is in no text.

    >>> mentions(words("Paris (France) is large."), "the France"), mentions(words("3.5 m"), "5")
    (True, False)
    """
    sought = _sought(answer)
    return sought != "" and sought in text_words


@lru_cache(maxsize=4096)
def _sought(answer: str) -> str:
    form = words(answer)
    return form if normalize_answer(answer) and not form.isspace() else ""


def greedy_clusters(answers: Sequence[str], equivalent: Callable[[int, int], bool]) -> list[int]:
    """Cluster answers greedily in their order: an unassigned answer opens a cluster and takes its later equivalents.

    Args:
        answers: K answers in rollout order.
        equivalent: ``equivalent(i, j)`` for the answer ``i`` that opened the cluster and a later one ``j``. It is not
            asked about answers that are identical once normalised: those are equivalent.

    Returns:
        K cluster ids, 0, 1, … in the order in which the clusters were opened.

    >>> greedy_clusters(["Paris", "Lyon", "paris."], lambda i, j: False)
    [0, 1, 0]
    """
    keys = [identity_key(answer) for answer in answers]
    clusters: list[int | None] = [None] * len(answers)
    opened = 0
    for i, key in enumerate(keys):
        if clusters[i] is not None:
            continue
        clusters[i] = opened
        for j in range(i + 1, len(answers)):
            if clusters[j] is None and (keys[j] == key or equivalent(i, j)):
                clusters[j] = opened
        opened += 1
    return [cluster for cluster in clusters if cluster is not None]
