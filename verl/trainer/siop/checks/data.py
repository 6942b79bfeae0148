"""The data files: their schemas, and in every row all that a run takes from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, ListConfig
from tqdm import tqdm
from verl.trainer.siop.checks.policy import Policy
from verl.trainer.siop.checks.rows import MEDIA, wrong_media, wrong_messages, wrong_tools
from verl.trainer.siop.rollouts.rows import question_of
from verl.utils.reward_score.siop_reward import parse_aliases
from verl.utils.siop.data.chat import PromptError
from verl.utils.siop.errors import SiopConfigError, SiopError
from verl.utils.siop.siop_process_reward import SiopConfig

# Columns that verl writes itself, or passes by these names beside those of the data.
RESERVED = frozenset({
    "prompts", "responses", "response_mask", "rm_scores", "rollout_log_probs", "extra_fields", "num_turns", "metrics",
    "routed_experts", "output", "validate", "trajectory", "trace", "session_id", "sampling_params", "self", "priority",
    "__rollout_n__", "__do_sample__",
})  # fmt: skip
SHOWN_ROWS = 5000  # a file of more rows gets a progress bar
REWARD = "pkg://verl.utils.reward_score.siop_reward"


class DataError(SiopConfigError):
    """A data file is missing, or its content is not what verl's RL format needs."""


@dataclass
class Use:
    """What a run does with the rows of one key.

    Args:
        key: ``data.train_files`` or ``data.val_files``.
        config: the whole configuration.
        policy: renders the prompts.
        question: whether the question is taken from the row (SIOP's training).
        labels: how labels are used: "" not at all, "read" by the metrics, "needed" in every row (IGPO), "some" (GRPO).
        verified: whether every row needs an agent loop that scores turns (VPR).
    """

    key: str
    config: DictConfig
    policy: Policy
    question: bool
    labels: str
    verified: bool = False
    rows: int = field(default=0, init=False)
    fits: list[bool] = field(default_factory=list, init=False)  # whether the filter of long prompts keeps a row
    labelled: int = field(default=0, init=False)

    @classmethod
    def of(cls, key: str, config: DictConfig, siop: SiopConfig, policy: Policy) -> Use:
        """The use of ``data.train_files`` or ``data.val_files`` in this run."""
        trains = key == "data.train_files"
        by_siop = config.algorithm.adv_estimator == "siop"
        labels = "read" if config.reward.custom_reward_function.get("path") == REWARD else ""
        if trains and by_siop and siop.siop_use_gold_ref:
            labels = "needed"
        elif trains and not by_siop and labels:
            labels = "some"
        verified = trains and by_siop and siop.siop_reward_mode == "verifiable"
        return cls(key, config, policy, trains and by_siop, labels, verified)

    # ------------------------------------------------------------------ one row
    def check(self, row: Mapping[str, Any]) -> str:
        """What is wrong with a row, or nothing. Counts it, and whether it is kept and labelled."""
        messages = row.get(self.config.data.prompt_key)
        extra = row.get("extra_info")
        wrong = wrong_messages(messages) or wrong_tools(extra, self._tools(row)) or self._wrong_agent(row)
        if wrong:
            return wrong
        assert isinstance(messages, list)
        if not self.policy.takes_media and (wrong := wrong_media(messages, row, media_columns(self.config))):
            return wrong
        if self.question or self.config.trainer.get("val_only", False):  # an evaluation writes it down
            try:
                question = question_of(messages, extra)
            except SiopError as error:
                return str(error)
            if self.question and not question.strip():
                return "the question is empty"
        label = self._wrong_label(row.get("reward_model"), self._agent(row))
        return label or self._wrong_game(row) or self._wrong_length(messages, row)

    def _agent(self, row: Mapping[str, Any]) -> Any:
        return row.get("agent_name", self.policy.agent)

    def _tools(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.policy.tools if self._agent(row) != "single_turn_agent" else {}

    def _wrong_agent(self, row: Mapping[str, Any]) -> str:
        agent = self._agent(row)
        if agent not in self.policy.agents:
            return f"'agent_name' is {agent!r}; choose one of {', '.join(sorted(self.policy.agents))}"
        if agent == "single_turn_agent" and self.policy.tools:
            return (
                "'agent_name' is 'single_turn_agent', which calls no tools, but multi_turn.tool_config_path names "
                "some; set it to tool_agent, drop the column, or set the path to null"
            )
        return ""

    def _wrong_game(self, row: Mapping[str, Any]) -> str:
        """What an agent loop that scores itself has against the row; VPR needs such an agent loop."""
        if self._agent(row) in self.policy.scoring_agents:
            return self.policy.scoring_agents[self._agent(row)](row.get("extra_info"))
        if self.verified:
            return (
                f"algorithm.siop_reward_mode=verifiable needs an agent loop that scores turns, and 'agent_name' is "
                f"{self._agent(row)!r}; choose {' or '.join(sorted(self.policy.scoring_agents)) or 'verified_game'}"
            )
        return ""

    def _wrong_label(self, label: Any, agent: str) -> str:
        if not isinstance(label, dict):
            return "'reward_model' is null; without a label write {'ground_truth': null}"
        if agent in self.policy.scoring_agents:
            self.labelled += 1  # by its own outcome
            return ""
        if not self.labels:
            return ""
        try:
            aliases = parse_aliases(label.get("ground_truth"))
        except ValueError as error:
            return f"the label in 'reward_model' cannot be read: {error}"
        self.labelled += bool(aliases)
        if self.labels == "needed" and not aliases:
            return "algorithm.siop_use_gold_ref=true needs a label in every row, and 'reward_model' has none"
        return ""

    def _wrong_length(self, messages: list[dict[str, Any]], row: Mapping[str, Any]) -> str:
        data, limit = self.config.data, self.policy.limit
        selection = (row.get("extra_info") or {}).get("tool_selection")
        offers = self._tools(row)
        try:
            # The filter renders all tools, whatever a row selects.
            length = longest = len(self.policy.prompt_ids(messages, self.policy.schemas() if offers else []))
            if offers and selection:
                length = len(self.policy.prompt_ids(messages, self.policy.schemas(selection)))
        except PromptError as error:
            return f"the chat template cannot render the prompt: {error}"
        self.fits.append(not data.filter_overlong_prompts or longest <= data.max_prompt_length)
        if length <= limit or not self.fits[-1]:
            return ""
        key = "data.max_prompt_length" if limit == data.max_prompt_length else "actor_rollout_ref.rollout.prompt_length"
        advice = "" if data.filter_overlong_prompts else " or set data.filter_overlong_prompts=true"
        return f"the prompt has {length} tokens, {key} is {limit}; raise it (tools in the prompt count too){advice}"

    # ------------------------------------------------------------------ all rows
    def _drawn(self, most: int) -> int:
        """The rows that verl's RLHFDataset leaves: it draws ``most`` of them, and leaves out what is too long then."""
        data, kept = self.config.data, sum(self.fits)
        if not 0 < most < self.rows:
            return kept
        if not data.get("shuffle", False):
            return sum(self.fits[:most])
        if data.get("seed") is None:
            return min(kept, most)  # nobody knows which
        chosen = np.random.default_rng(data.seed).choice(self.rows, size=most, replace=False)
        return sum(self.fits[int(index)] for index in chosen)

    @property
    def left(self) -> int:
        """The rows that verl draws from."""
        most = "train_max_samples" if self.key == "data.train_files" else "val_max_samples"
        return self._drawn(self.config.data.get(most, -1))

    def check_counts(self) -> str:
        """Whether the rows are enough; a line about them."""
        data, trains = self.config.data, self.key == "data.train_files"
        kept, left = sum(self.fits), self.left
        if not self.rows:
            raise DataError(f"{self.key}: the files have no rows")
        needed = data.train_batch_size if trains else 1
        if left < needed:
            lost = f" ({self.rows - left} of {self.rows} are left out by length or number)" if left < self.rows else ""
            wanted = f"data.train_batch_size is {needed}" if trains else "a validation needs one"
            raise DataError(f"{self.key}: {left} rows{lost}, {wanted}; give more rows, or a smaller number")
        if self.labels == "some" and not self.labelled:
            raise DataError(
                f"{self.key}: no row has a label, from which algorithm.adv_estimator="
                f"{self.config.algorithm.adv_estimator} would take the reward"
            )
        dropped = f", {self.rows - kept} left out as too long" if self.rows > kept else ""
        return f"{self.rows} rows{dropped}" + (f", {self.labelled} with a label" if self.labels else "")


# ---------------------------------------------------------------------- files
def files_of(config: DictConfig, key: str) -> list[str]:
    """The paths of ``data.train_files`` or ``data.val_files``."""
    value = config.data[key.removeprefix("data.")]
    return [str(path) for path in value] if isinstance(value, list | ListConfig) else [str(value)]


def read_schema(path: str, key: str, prompt: str = "prompt") -> pa.Schema:
    """The schema of a parquet file in verl's RL format.

    Raises:
        DataError: naming the configuration key, the file and the column.
    """
    where = Path(path).expanduser()
    if not where.is_file():
        raise DataError(f"{key}={path}: no such file")
    try:
        schema = pq.read_schema(where)
    except (OSError, ValueError) as error:
        raise DataError(f"{key}={path}: not a parquet file: {error}") from error
    if where.suffix != ".parquet":
        raise DataError(f"{key}={path}: verl knows a parquet file by its name, which must end in .parquet")
    columns = {"data_source": "string", prompt: "list", "reward_model": "struct"}
    for column in columns:
        if column not in schema.names:
            raise DataError(f"{key}={path}: column '{column}' is missing; found {sorted(schema.names)}")
    for column, kind in {**columns, "extra_info": "struct", "agent_name": "string"}.items():
        found = str(schema.field(column).type) if column in schema.names else "null"
        if not found.removeprefix("large_").startswith(kind) and (column in columns or found != "null"):
            raise DataError(f"{key}={path}: column '{column}' has type {found}, needs {kind}")
    if "ground_truth" not in [part.name for part in schema.field("reward_model").type]:
        raise DataError(f"{key}={path}: column 'reward_model' has no field 'ground_truth' (it may hold nulls)")
    if taken := sorted(RESERVED & set(schema.names)):
        raise DataError(f"{key}={path}: column '{taken[0]}' would take the place of verl's own; give it another name")
    return schema


def check_schemas(schemas: Mapping[str, pa.Schema], key: str) -> None:
    """Check that several files of one key can be read as one table, as verl reads them.

    Raises:
        DataError: naming the column, both files and both types.
    """
    import datasets

    first: dict[str, tuple[str, Any]] = {}
    for path, schema in schemas.items():
        for name, feature in datasets.Features.from_arrow_schema(schema).items():
            earlier, found = first.setdefault(name, (path, feature))
            if found == datasets.Value("null"):
                first[name] = path, feature
            if not _unite(found, feature):
                types = [str(schemas[where].field(name).type) for where in (earlier, path)]
                raise DataError(
                    f"{key}: column '{name}' has type {types[0]} in {earlier} and {types[1]} in {path}; write the "
                    "files with one type"
                )
    for (one, a), (other, b) in itertools.pairwise(schemas.items()):
        if ("agent_name" in a.names) != ("agent_name" in b.names):
            has, lacks = (one, other) if "agent_name" in a.names else (other, one)
            raise DataError(f"{key}: column 'agent_name' is in {has} and not in {lacks}, whose rows would have none")


def _unite(one: Any, other: Any) -> bool:
    """Whether columns of these features make one column."""
    import datasets

    if one == other:
        return True
    try:
        datasets.concatenate_datasets(
            [
                datasets.Dataset.from_dict({"x": [None]}, features=datasets.Features({"x": each}))
                for each in (one, other)
            ]
        )
    except Exception:  # noqa: BLE001  (it raises what it comes upon first)
        return False
    return True


def rows_of(path: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, with a progress bar if there are many."""
    where = Path(path).expanduser()
    total = pq.read_metadata(where).num_rows
    with pq.ParquetFile(where) as file, tqdm(total=total, desc=f"check {path}", disable=total < SHOWN_ROWS) as bar:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()
            bar.update(batch.num_rows)


KEYS = ("data.train_files", "data.val_files")


def media_columns(config: DictConfig) -> tuple[str, ...]:
    """The columns from which verl takes images, videos and sounds."""
    return tuple(config.data.get(f"{kind}_key") or f"{kind}s" for kind in MEDIA)


def check_files(config: DictConfig) -> str:
    """Check that the data files are there, and their columns, by their schemas alone.

    Raises:
        DataError: naming the key, the file and the column.
    """
    if (config.data.get("custom_cls") or {}).get("path"):
        return "made by data.custom_cls"
    paths = {key: files_of(config, key) for key in KEYS}
    for key in KEYS:
        check_schemas({path: read_schema(path, key, config.data.prompt_key) for path in paths[key]}, key)
    return "; ".join(f"{key} {', '.join(paths[key])}" for key in KEYS)


def first_row(config: DictConfig) -> dict[str, Any]:
    """The prompt and, where there is one, ``extra_info`` of the first row of the data.

    Raises:
        DataError: there is no row, or its prompt is none.
    """
    prompt = config.data.prompt_key
    places = [(key, path) for key in KEYS for path in files_of(config, key)]
    for key, path in places:
        names = [name for name in (prompt, "extra_info") if name in read_schema(path, key, prompt).names]
        for row in rows_of(path, names):
            if wrong := wrong_messages(row[prompt]):
                raise DataError(f"{path}: row 0: {wrong}")
            return row
    raise DataError(f"{KEYS[0]}: the files have no rows")


def check_rows(
    config: DictConfig,
    siop: SiopConfig,
    policy: Policy,
    warn: Callable[[str], None],
    left: Callable[[str, int], None] = lambda key, rows: None,
) -> str:
    """Check every row of every file for all that the run takes from it. An evaluation draws no training rows.

    Args:
        config, siop, policy: of the run.
        warn: gets what is no error, but worth a look.
        left: gets each key with the rows that verl draws from.

    Raises:
        DataError: naming the file, the row and what is wrong with it; or too few rows.
    """
    if (config.data.get("custom_cls") or {}).get("path"):
        warn(f"data.custom_cls.path={config.data.custom_cls.path}: rows that this class makes are not checked")
        return "made by data.custom_cls"
    media = () if policy.takes_media else media_columns(config)
    wanted = (config.data.prompt_key, "reward_model", "extra_info", "agent_name", *media)
    uses = [Use.of(key, config, siop, policy) for key in KEYS[bool(config.trainer.get("val_only", False)) :]]
    for use in uses:
        for path in files_of(config, use.key):
            names = read_schema(path, use.key, wanted[0]).names
            for number, row in enumerate(rows_of(path, [name for name in wanted if name in names])):
                use.rows += 1
                if wrong := use.check(row):
                    raise DataError(f"{path}: row {number}: {wrong}")
        left(use.key, use.left)
    return "; ".join(f"{use.key} {use.check_counts()}" for use in uses)
