"""What building an index of BM25 will take, from a sample of its corpus."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from verl.utils.siop.retriever.bm25_blocks import Inverter
from verl.utils.siop.retriever.corpus import CorpusError, parse_line

logger = logging.getLogger(__name__)

SMALL_BYTES = 2**24  # a corpus below this takes seconds, and nothing is said
_PLACES, _LINES = 20, 100  # of the sample
# Measured with benchmarks/bm25.py: what the sample does not show.
_MERGE_S = 7e-8  # of a posting
_MEMORY, _MEMORY_OF_DOCUMENT = 1.6e9, 20
# Postings: document and impact in the index; document and count in the blocks. Documents: offset; and length, id.
_INDEX_OF_POSTING, _BLOCKS_OF_POSTING, _INDEX_OF_DOCUMENT, _BLOCKS_OF_DOCUMENT = 8, 5, 8, 20


class Estimate(NamedTuple):
    """Of a whole build by one core: passages, seconds, and bytes of memory, of disk meanwhile, and of the index."""

    documents: float
    seconds: float
    memory: float
    disk: float
    kept: float

    def __str__(self) -> str:
        minutes = max(1, round(self.seconds / 60))
        return (
            f"about {self.documents:,.0f} passages: {minutes} min of one core, {self.memory / 1e9:.1f} GB of memory, "
            f"{self.disk / 1e9:.1f} GB of disk while it is built and {self.kept / 1e9:.1f} GB after"
        )


def estimate(corpus: Path) -> Estimate:
    """Measures the indexing of up to 2,000 passages spread over the corpus.

    Raises:
        CorpusError: none of them can be read.
    """
    size = corpus.stat().st_size
    inverter, read = Inverter(0), 0
    started = time.process_time()
    with corpus.open("rb") as file:
        for place in range(_PLACES):
            if file.seek(place * size // _PLACES):
                file.readline()  # the rest of a line
            for _ in range(_LINES):
                line = file.readline()
                read += len(line)
                # Blank, the end, or wrong, which the build names with its number.
                with contextlib.suppress(CorpusError):
                    inverter.add(0, parse_line(line, str(corpus)))
    if not len(inverter):
        raise CorpusError(f"{corpus}: no line of {_PLACES * _LINES} is a passage, an object with 'id' and 'contents'")
    postings = len(inverter.arrays()["documents"]) * size / read
    documents = len(inverter) * size / read
    index = _INDEX_OF_POSTING * postings + _INDEX_OF_DOCUMENT * documents
    return Estimate(
        documents,
        seconds=(time.process_time() - started) * size / read + _MERGE_S * postings,
        memory=_MEMORY + _MEMORY_OF_DOCUMENT * documents,
        disk=index + _BLOCKS_OF_POSTING * postings + _BLOCKS_OF_DOCUMENT * documents,
        kept=index,
    )


def announce(corpus: Path, target: Path) -> None:
    """Log the estimate, and a warning if the disk has less; nothing for a corpus that takes seconds.

    Raises:
        CorpusError: as :func:`estimate`.
    """
    if corpus.stat().st_size < SMALL_BYTES:
        return
    expected = estimate(corpus)
    logger.info("%s", expected)
    free = shutil.disk_usage(target.resolve().parent).free
    if free < expected.disk:
        logger.warning("%s has only %.1f GB free; what is finished is kept if that runs out", target.parent, free / 1e9)
