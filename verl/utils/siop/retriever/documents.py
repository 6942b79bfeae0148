"""The documents of a corpus of passages: finds all passages of a title, or the one of an id."""

from __future__ import annotations

import hashlib
import logging
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from verl.utils.siop.retriever.bm25_files import write_array
from verl.utils.siop.retriever.corpus import CorpusFile, CorpusReader, Document, check_ids, id_key, unchanged
from verl.utils.siop.retriever.folder import (
    CorpusIdentity,
    IndexFolderError,
    Manifest,
    check_folder,
    check_target,
    identify_files,
    new_folder,
    read_manifest,
    write_manifest,
)
from verl.utils.siop.retriever.parts import locked_parts

logger = logging.getLogger(__name__)

KIND = "documents"
MAX_PASSAGES = 4096  # of a document; what it takes to make a page grows with them
_KEYS, _NUMBERS, _OFFSETS = "keys.npy", "numbers.npy", "offsets.npy"


def title_of(document: Document) -> str | None:
    """Its ``title``, or else the first of several lines of its ``contents``, without the quotes of wiki-18."""
    title = document.get("title")
    if isinstance(title, str):
        return title
    first, line_break, _ = document["contents"].partition("\n")
    return first.strip().strip('"') if line_break else None


class Documents:
    """Titles and ids of a corpus, as sorted 64-bit digests on disk: 32 bytes a passage; in memory while it is built.

    Args:
        keys: [entries] digests, sorted.
        numbers: [entries] the passage of each; of equal digests in the order of the corpus.
        passages: of the corpus.
    """

    def __init__(self, keys: np.ndarray, numbers: np.ndarray, passages: CorpusFile) -> None:
        self._keys, self._numbers, self._passages = keys, numbers, passages

    @classmethod
    def open(cls, corpus: Path, folder: Path, *, show_progress: bool = True) -> Documents:
        """Loads the lookup of this corpus from the folder, and builds it first if it is not there or of another corpus.

        Raises:
            CorpusError: as :class:`CorpusReader`, an id that is there twice, a corpus that changes meanwhile, or the
                folder holds something else.
        """
        try:
            return cls._load(corpus, folder, show_progress)
        except IndexFolderError as error:
            reason = error
        check_target(folder, KIND)
        with locked_parts(folder) as (parts, waited):
            if waited:  # the other process may have built what is needed
                try:
                    return cls._load(corpus, folder, show_progress)
                except IndexFolderError as error:
                    reason = error
            if folder.is_dir():
                logger.info("titles of %s again: %s", corpus, reason)
            return cls._build(corpus, folder, parts, show_progress)

    @classmethod
    def _load(cls, corpus: Path, folder: Path, show_progress: bool) -> Documents:
        manifest = read_manifest(folder)
        if manifest.kind != KIND:
            raise IndexFolderError(f"{folder} holds an index of kind {manifest.kind}, not {KIND}")
        with unchanged(corpus, "checked"):
            check_folder(folder, manifest, corpus, show_progress=show_progress)
            return cls._mapped(corpus, folder)

    @classmethod
    def _mapped(cls, corpus: Path, folder: Path) -> Documents:
        keys, numbers, offsets = (np.load(folder / name, mmap_mode="r") for name in (_KEYS, _NUMBERS, _OFFSETS))
        return cls(keys, numbers, CorpusFile(corpus, offsets))

    @classmethod
    def _build(cls, corpus: Path, folder: Path, parts: Path, show_progress: bool) -> Documents:
        keys, numbers, offsets, ids = array("Q"), array("i"), array("q"), array("Q")
        with unchanged(corpus, "read") as check:
            with CorpusReader(corpus, show_progress=show_progress) as reader:
                for number, (offset, document) in enumerate(reader):
                    offsets.append(offset)
                    ids.append(id_key(document))
                    title = title_of(document)
                    for key in [_key("id", str(document["id"])), *([_key("title", title)] if title else [])]:
                        keys.append(key)
                        numbers.append(number)
            check_ids(corpus, np.asarray(ids), np.asarray(offsets))
            order = np.argsort(np.asarray(keys), kind="stable")
            with new_folder(folder, parts, KIND) as scratch:
                write_array(scratch / _KEYS, np.asarray(keys)[order])
                write_array(scratch / _NUMBERS, np.asarray(numbers)[order])
                write_array(scratch / _OFFSETS, np.asarray(offsets))
                identity = CorpusIdentity(
                    path=str(corpus.resolve()), bytes=reader.offset, sha256=reader.sha256, documents=len(offsets)
                )
                write_manifest(
                    scratch,
                    Manifest(
                        kind=KIND,
                        corpus=identity,
                        libraries={"numpy": np.__version__},
                        settings={},
                        self_test=[],
                        measured={},
                        files=identify_files(scratch, scratch.glob("*.npy")),
                    ),
                )
                found = cls._mapped(corpus, scratch)
                check()
        return found

    def read(self, name: str, page: int, page_chars: int) -> dict[str, Any] | None:
        """A page of the document with this title, or else this id; None if there is none.

        A document is the first 4,096 passages of its title.

        Args:
            name: upper and lower case, white space and quotes around it do not matter.
            page: from 1.
            page_chars: characters of a page.

        Returns:
            ``title``, ``text`` of the page, ``pages``: the number of them.
        """
        found = self._find("title", name, title_of) or self._find("id", name, lambda passage: str(passage["id"]))
        if not found:
            return None
        texts = []
        for passage in found:
            first, line_break, rest = passage["contents"].partition("\n")
            heading = bool(line_break) and title_of(passage) == first.strip().strip('"')
            texts.append(rest if heading else passage["contents"])
        text = "\n".join(texts)
        return {
            "title": title_of(found[0]) or str(found[0]["id"]),
            "text": text[(page - 1) * page_chars : page * page_chars],
            "pages": max(1, -(-len(text) // page_chars)),
        }

    def _find(self, kind: str, name: str, name_of: Any) -> list[Document]:
        key = np.uint64(_key(kind, name))
        start, end = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        numbers = self._numbers[start : min(end, start + MAX_PASSAGES)]
        passages = (self._passages[int(number)] for number in numbers)
        # A digest may be that of another name.
        return [passage for passage in passages if _plain(name_of(passage) or "") == _plain(name)]


def _plain(name: str) -> str:
    return " ".join(name.casefold().split()).strip('" ')


def _key(kind: str, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{kind}\0{_plain(name)}".encode(), digest_size=8).digest(), "little")
