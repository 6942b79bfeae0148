"""The making of a folder of vectors in shards, so that an interrupted run goes on with the first that is not whole.

Until it is an index, the folder has ``encoding.json`` in place of a manifest: what is made, how, and the digests of the
shards that are whole.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
from array import array
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm
from verl.utils.siop.retriever.corpus import (
    CorpusError,
    CorpusFile,
    CorpusReader,
    Stamp,
    check_corpus,
    check_ids,
    id_key,
    stamp_of,
    unchanged,
)
from verl.utils.siop.retriever.dense import (
    FLAT,
    OFFSETS_FILE,
    PROBE_QUERIES,
    PROBES_FILE,
    choose_self_test,
    probe_rows,
    probe_vectors,
)
from verl.utils.siop.retriever.encoder import Encoder, EncoderIdentity
from verl.utils.siop.retriever.folder import (
    MANIFEST,
    CorpusIdentity,
    FileIdentity,
    IndexFolderError,
    Manifest,
    identify,
    identify_files,
    read_manifest,
    shard_name,
    sweep,
    write_manifest,
    write_whole,
)
from verl.utils.siop.retriever.vectors import (
    FlatVectors,
    open_shards,
    shard_path,
    write_array,
    write_shard,
)

logger = logging.getLogger(__name__)

STATE_FILE = "encoding.json"


def library_versions() -> dict[str, str]:
    """Of what vectors depend on."""
    return {
        name: importlib.metadata.version(name) for name in ("numpy", "sentence-transformers", "torch", "transformers")
    }


class _Settings(BaseModel):
    """What makes the vectors; ``source`` is the encoder, or a file of another project."""

    model_config = ConfigDict(extra="ignore")

    encoder: EncoderIdentity
    source: str
    shard_rows: int


class _State(_Settings):
    """Settings, and how far it is; ``shards`` by number."""

    format: Literal[1] = 1
    corpus: CorpusIdentity
    offsets: FileIdentity
    shards: dict[int, FileIdentity] = {}


class VectorJob:
    """Vectors of a corpus, in the making.

    Args:
        folder: of the index.
        state: as it is written there.
        stamp: of the corpus before its content was looked at.

    Attributes:
        documents: the corpus.
        shards: how many there will be.
        todo: numbers of the shards that are not whole.
    """

    def __init__(self, folder: Path, state: _State, stamp: Stamp) -> None:
        self._folder, self._state, self._stamp = folder, state, stamp
        self.corpus, self.offsets_file = Path(state.corpus.path), folder / OFFSETS_FILE
        self.documents = CorpusFile(self.corpus, np.load(self.offsets_file, mmap_mode="r"))
        self.shards = -(-len(self.documents) // state.shard_rows)
        self.todo = [number for number in range(self.shards) if not self._is_whole(number)]

    @classmethod
    def open(
        cls,
        folder: Path,
        corpus: Path,
        encoder: EncoderIdentity,
        *,
        source: str,
        shard_rows: int,
        show_progress: bool = True,
    ) -> VectorJob | None:
        """Begins, or goes on with what was begun; None if the folder is a whole index of just this.

        A finished index with damaged files is begun again, with those shards that are whole. To be called, and the job
        to be done, under :func:`locked_parts`.

        Raises:
            CorpusError: a bad corpus, an id that is there twice, or the folder holds something else; what differs is
                named.
        """
        if shard_rows < 1:
            raise CorpusError(f"--shard-rows is at least 1, got {shard_rows}")
        settings = _Settings(encoder=encoder, source=source, shard_rows=shard_rows)
        check_corpus(corpus)
        begun, stamp, offsets = _begun(folder), stamp_of(corpus), None
        with unchanged(corpus, "read"):
            if begun is None:
                content, offsets = _read(corpus, show_progress)
            else:
                content, damaged = _hash(corpus, folder, begun, show_progress)
                settings = _refuse_other(folder, settings, content, begun)
                if begun.finished and not damaged:
                    (folder / STATE_FILE).unlink(missing_ok=True)
                    return None
                if not _is_whole(folder / OFFSETS_FILE, begun.files.get(OFFSETS_FILE)):
                    _, offsets = _read(corpus, show_progress)
        (folder / "vectors").mkdir(parents=True, exist_ok=True)
        sweep(folder)
        sweep(folder / "vectors")
        if offsets is not None:
            write_array(folder / OFFSETS_FILE, offsets)
        documents = len(np.load(folder / OFFSETS_FILE, mmap_mode="r"))
        files = begun.files if begun else {}
        state = _State(
            **settings.model_dump(),
            corpus=CorpusIdentity(path=str(corpus.resolve()), documents=documents, **content.model_dump()),
            offsets=identify(folder / OFFSETS_FILE),
            shards={n: files[name] for n in range(-(-documents // shard_rows)) if (name := shard_name(n)) in files},
        )
        job = cls(folder, state, stamp)
        job._save()
        if begun and begun.finished:
            logger.warning("%s is damaged (%s); what is whole is kept", folder, ", ".join(damaged[:3]))
            (folder / MANIFEST).unlink()
        return job

    def rows(self, number: int) -> range:
        """Numbers of the documents of a shard."""
        first = number * self._state.shard_rows
        return range(first, min(first + self._state.shard_rows, len(self.documents)))

    @property
    def rows_todo(self) -> int:
        """Documents whose vectors are not there yet."""
        return sum(len(self.rows(number)) for number in self.todo)

    def path(self, number: int) -> Path:
        """File of a shard."""
        return shard_path(self._folder, number)

    def announce(self, where: str) -> None:
        """Say what will be made.

        Raises:
            CorpusError: the disk has too little room for it.
        """
        encoder, free = self._state.encoder, shutil.disk_usage(self._folder).free
        needed = 2 * encoder.dimension * self.rows_todo
        logger.info(
            "%d passages of %s, vectors by %s (%s, %s pooling, %s, at most %d tokens, prefixes %r and %r), on %s",
            len(self.documents),
            self.corpus,
            self._state.source,
            encoder.model,
            encoder.pooling,
            encoder.dtype,
            encoder.max_passage_tokens,
            encoder.query_prompt,
            encoder.passage_prompt,
            where,
        )
        logger.info(
            "%.2f GB in %s: %d of %d shards are there, %.2f GB to write, %.2f GB free",
            2 * encoder.dimension * len(self.documents) / 1e9,
            self._folder,
            self.shards - len(self.todo),
            self.shards,
            needed / 1e9,
            free / 1e9,
        )
        if needed > free:
            raise CorpusError(f"{self._folder}: {needed / 1e9:.2f} GB to write, and {free / 1e9:.2f} GB are free")

    def bar(self, show_progress: bool) -> tqdm:
        """A bar that counts passages."""
        total = len(self.documents)
        options = {"unit": " passages", "unit_scale": True, "disable": not show_progress}
        return tqdm(desc="vectors", total=total, initial=total - self.rows_todo, **options)

    def write(self, number: int, vectors: np.ndarray) -> None:
        """Writes a shard: its rows are now whole.

        Raises:
            CorpusError: it cannot be written.
        """
        self.add(number, write_shard(self.path(number), vectors))

    def add(self, number: int, identity: FileIdentity) -> None:
        """Note that another process has written a shard.

        Raises:
            CorpusError: that cannot be written.
        """
        self._state.shards[number] = identity
        self._save()

    def finish(self, encoder: Encoder, measured: dict[str, Any]) -> Manifest:
        """Makes the folder an index, once every shard is whole.

        Raises:
            CorpusError: the corpus has changed meanwhile, or vectors and passages do not belong together.
        """
        state, folder = self._state, self._folder
        if stamp_of(self.corpus) != self._stamp:
            raise CorpusError(f"{self.corpus} has changed while its vectors were made; remove {folder} and begin again")
        shards = {f"vectors/{self.path(n).name}": state.shards[n] for n in range(self.shards)}
        maps = open_shards([folder / name for name in shards], len(self.documents), state.encoder.dimension)
        self_test = choose_self_test(encoder, FlatVectors(maps), self.documents)
        passages = [self.documents[row]["contents"] for row in probe_rows(len(self.documents))]
        write_array(folder / PROBES_FILE, probe_vectors(encoder, passages))
        manifest = Manifest(
            kind=FLAT,
            corpus=state.corpus,
            libraries=library_versions(),
            settings={
                **_Settings.model_validate(state.model_dump()).model_dump(),
                "probe_queries": PROBE_QUERIES,
                "probe_passages": probe_rows(len(self.documents)),
            },
            self_test=self_test,
            measured=measured,
            files=identify_files(folder, [folder / OFFSETS_FILE, folder / PROBES_FILE]) | shards,
        )
        write_manifest(folder, manifest)
        (folder / STATE_FILE).unlink()
        logger.info("%s: the index of %d passages is whole", folder, len(self.documents))
        return manifest

    def _is_whole(self, number: int) -> bool:
        return _is_whole(self.path(number), self._state.shards.get(number))

    def _save(self) -> None:
        write_whole(self._folder / STATE_FILE, self._state.model_dump_json(indent=1).encode())


class _Begun(NamedTuple):
    """What a folder holds: how its vectors are made, of what, and the files that were whole."""

    settings: _Settings
    corpus: CorpusIdentity
    files: dict[str, FileIdentity]
    finished: bool


def _begun(folder: Path) -> _Begun | None:
    """None if nothing was begun.

    Raises:
        CorpusError: the folder holds something else, or what was begun cannot be known any more.
    """
    if (folder / MANIFEST).exists():
        try:
            manifest = read_manifest(folder)
        except IndexFolderError as error:
            raise IndexFolderError(f"{error}, after you have removed {folder}") from error
        if manifest.kind != FLAT:
            raise IndexFolderError(f"{folder} holds an index of kind {manifest.kind}; choose another folder")
        return _Begun(_Settings.model_validate(manifest.settings), manifest.corpus, manifest.files, finished=True)
    state_file = folder / STATE_FILE
    if state_file.exists():
        try:
            state = _State.model_validate_json(state_file.read_bytes())
        except ValidationError as error:
            raise IndexFolderError(f"{state_file} is damaged; remove {folder} and begin again") from error
        shards = {shard_name(number): identity for number, identity in state.shards.items()}
        return _Begun(state, state.corpus, {OFFSETS_FILE: state.offsets, **shards}, finished=False)
    if folder.exists():
        # What a process that was stopped before its first state may have left: no vectors yet.
        foreign = not folder.is_dir() or {path.name for path in folder.glob("[!.]*")} - {OFFSETS_FILE, "vectors"}
        if foreign or any((folder / "vectors").glob("[!.]*")):
            raise CorpusError(f"{folder} is not empty and holds no index; choose another folder")
    return None


def _is_whole(path: Path, identity: FileIdentity | None, bar: tqdm | None = None) -> bool:
    return identity is not None and path.is_file() and identify(path, bar) == identity


def _hash(corpus: Path, folder: Path, begun: _Begun, show_progress: bool) -> tuple[FileIdentity, list[str]]:
    """Content of the corpus, and names of the files of a finished index that are not whole."""
    files = begun.files if begun.finished else {}
    total = corpus.stat().st_size + sum(identity.bytes for identity in files.values())
    with tqdm(desc="hash", total=total, unit="B", unit_scale=True, disable=not show_progress) as bar:
        content = identify(corpus, bar)
        return content, [name for name, identity in files.items() if not _is_whole(folder / name, identity, bar)]


def _read(corpus: Path, show_progress: bool) -> tuple[FileIdentity, np.ndarray]:
    """Content of the corpus, and [documents] first bytes.

    Raises:
        CorpusError: a bad corpus, or an id that is there twice.
    """
    offsets, ids = array("q"), array("Q")
    with CorpusReader(corpus, show_progress=show_progress) as reader:
        for offset, document in reader:
            offsets.append(offset)
            ids.append(id_key(document))
    if not offsets:
        raise CorpusError(f"{corpus} is empty: an index needs at least one document")
    found = np.frombuffer(offsets, dtype=np.int64)
    check_ids(corpus, np.frombuffer(ids, dtype=np.uint64), found)
    return FileIdentity(bytes=reader.offset, sha256=reader.sha256), found


def _refuse_other(folder: Path, wanted: _Settings, content: FileIdentity, begun: _Begun) -> _Settings:
    """The settings to go on with."""
    if begun.finished:
        # That the same was computed elsewhere, on a GPU or a CPU, makes it no other index.
        encoder = wanted.encoder.model_copy(update={"dtype": begun.settings.encoder.dtype})
        wanted = wanted.model_copy(update={"encoder": encoder})

    def flat(settings: _Settings, sha256: str) -> dict[str, Any]:
        return {
            "corpus sha256": sha256,
            "source": settings.source,
            "--shard-rows": settings.shard_rows,
            **settings.encoder.model_dump(exclude={"model", "revision"}),  # the weights say more
        }

    there, asked = flat(begun.settings, begun.corpus.sha256), flat(wanted, content.sha256)
    differing = [
        f"{name} is {there[name]!r} there, {asked[name]!r} now" for name in there if there[name] != asked[name]
    ]
    if differing:
        raise IndexFolderError(
            f"{folder} was begun with something else: {'; '.join(differing)}; choose another folder, or remove it"
        )
    return wanted
