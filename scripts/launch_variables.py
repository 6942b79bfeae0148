"""The variables of the launchers: one table from which their checks, overrides, help and the README's table are made.

    python scripts/launch_variables.py check PROGRAM       refuses wrong values and variables that mean nothing
    python scripts/launch_variables.py overrides PROGRAM   what PROGRAM passes on: Hydra overrides, or options of the server
    python scripts/launch_variables.py show PROGRAM        every variable with its value
    python scripts/launch_variables.py foreign PROGRAM     names of the variables that only other programs read
    python scripts/launch_variables.py help PROGRAM        the table for --help
    python scripts/launch_variables.py readme              the table for README.md

PROGRAM is train, eval, scorer, retriever or quickstart. Needs the standard library alone, for it runs with whatever
Python is there.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PROGRAMS = ("train", "eval", "scorer", "retriever", "quickstart")
MAX_INT = 2**31 - 1

Check = Callable[[str], "str | None"]  # what is allowed, if the value is not


def whole(low: int, high: int = MAX_INT) -> Check:
    """A whole number without leading zeros, which neither bash nor Hydra reads as decimal."""

    def check(value: str) -> str | None:
        allowed = re.fullmatch(r"-?(0|[1-9][0-9]{0,9})", value) and low <= int(value) <= high
        return None if allowed else f"a whole number from {low} to {high}"

    return check


def _decimal(value: str) -> float | None:
    return float(value) if re.fullmatch(r"[0-9]*\.?[0-9]+([eE]-?[0-9]+)?|[0-9]+\.", value) else None


def share(value: str) -> str | None:
    number = _decimal(value)
    return None if number is not None and 0 < number <= 1 else "a share above 0 and at most 1, as 0.85"


def number(low: float, high: float | None = None) -> Check:
    def check(value: str) -> str | None:
        found = _decimal(value)
        upper = "" if high is None else f" to {high:g}"
        allowed = found is not None and low <= found and (high is None or found <= high)
        return None if allowed else f"a number from {low:g}{upper}"

    return check


def choice(*values: str) -> Check:
    return lambda value: None if value in values else f"one of {', '.join(values)}"


def _names(value: str) -> list[str]:
    return re.sub(r"[\[\]\s'\"]", "", value).split(",")


def loggers(value: str) -> str | None:
    names = _names(value)
    allowed = ("console", "tensorboard", "wandb", "swanlab", "mlflow", "file")
    return None if all(name in allowed for name in names) else f"a list as console,tensorboard of {', '.join(allowed)}"


def file_name(value: str) -> str | None:
    return None if "/" not in value else "a name without /, for it is part of the log's name"


@dataclass(frozen=True)
class Variable:
    """One row.

    Attributes:
        name: of the environment variable.
        programs: who reads it.
        default: as it is shown.
        meaning: for the help and the README.
        target: Hydra key or option of the server that takes the value; empty if the launcher itself uses it.
        check: what the value may be.
        why: why the default is not the first release's, as "release 10: ...".
        secret: never shown.
        also: further overrides, without which the value would have no effect.
        gpu: has an effect on GPUs alone.
    """

    name: str
    programs: str
    default: str
    meaning: str
    target: str = ""
    check: Check | None = None
    why: str = ""
    secret: bool = False
    also: Callable[[str], list[str]] | None = None
    gpu: bool = False


ROLLOUT = "actor_rollout_ref.rollout"
GPUS = "those of `CUDA_VISIBLE_DEVICES`, else all that `nvidia-smi` lists"

TABLE = (
    # --- data, model, folders
    Variable("MODEL_PATH", "train eval", "required; toy world's", "policy: a transformers model, folder or hub id", "actor_rollout_ref.model.path"),
    Variable("TRAIN_FILE", "train eval", "required; toy world's; eval: `VAL_FILE`", "training data, parquet; [a,b] for several", "data.train_files"),
    Variable("VAL_FILE", "train eval", "required; toy world's", "validation data, parquet; [a,b] for several", "data.val_files"),
    Variable("DATA_DIR", "train eval", "none", "data folder of `python -m verl.utils.siop.data build`: `TRAIN_FILE`, `VAL_FILE` and the settings in its `overrides.yaml`, where nothing else sets them"),
    Variable("CHECKPOINT_PATH", "eval", "first argument", "what is evaluated: `global_step_N` or a transformers model"),
    Variable("OUTPUT_DIR", "train eval quickstart", "`checkpoints/siop`, `checkpoints/siop_eval`, `runs/quickstart/…`",
             "checkpoints, and in `rollouts/` what was sampled; eval: metrics and samples; quickstart: results", "trainer.default_local_dir"),
    Variable("TOY_DIR", "train eval retriever quickstart", "`runs/toy`",
             "toy world (see `python -m examples.toy_world.build --help`), used if none of `MODEL_PATH`, `TRAIN_FILE`, `VAL_FILE` is set"),
    Variable("PROJECT_NAME", "train eval", "siop", "project, for W&B", "trainer.project_name"),
    Variable("EXPERIMENT_NAME", "train eval", "siop_main, siop_eval", "name of the run", "trainer.experiment_name", file_name),
    Variable("LOG_DIR", "train eval scorer retriever", "`logs`; quickstart: `$OUTPUT_DIR/logs`",
             "`siop_train.log`, which grows with each call (`siop_train-NAME.log` for another `EXPERIMENT_NAME`), `siop_eval.log`, `siop_scorer.log`, `retrieval_server.log`, PID files"),
    Variable("TENSORBOARD_DIR", "train", "`$OUTPUT_DIR/tensorboard`", "TensorBoard files"),
    Variable("TRAINER_LOGGER", "train", "console,tensorboard", "also wandb, swanlab, mlflow, file", "trainer.logger", loggers,
             "release console: TensorBoard needs no account"),
    # --- services
    Variable("TOOL_CONFIG", "train eval", "`config/local_search_tool_config.yaml`", "tools, in verl's format",
             f"{ROLLOUT}.multi_turn.tool_config_path"),
    Variable("RETRIEVER_URL", "train eval", "`http://127.0.0.1:8000/retrieve`", "where the search tool asks, past any proxy of the environment; replicas of one index with commas between"),
    Variable("SIOP_SCORER_URL", "train", "`http://127.0.0.1:8390`", "where the trainer asks"),
    Variable("SIOP_API_TOKEN", "train scorer quickstart", "none", "bearer token between trainer and scorer", secret=True),
    Variable("SERPER_API_KEY", "train eval", "none", "key of the web search (`config/serper_tool_config.yaml`); `HTTPS_PROXY` holds for it", secret=True),
    Variable("SERPER_CACHE_DIR", "train eval", "`search_cache`", "results of the web search, replayed without a key; empty: no cache"),
    # --- machine
    Variable("N_GPUS_PER_NODE", "train eval", GPUS, "GPUs of each node, 0 = CPU", check=whole(0, 1024), why="release 8: counted"),
    Variable("NNODES", "train", "1", "nodes; see [several nodes](#several-nodes)", "trainer.nnodes", whole(1, 65536)),
    Variable("RAY_ADDRESS", "train eval scorer", "none: a private Ray", "Ray cluster to join; see [several nodes](#several-nodes)"),
    Variable("OMP_NUM_THREADS", "train eval quickstart", "1", "threads of each process on a CPU", check=whole(1, 4096)),
    Variable("CONDA_ENV", "train eval scorer retriever quickstart", "none: the activated environment, else `.venv`", "conda environment to run in", why="release siop: what is activated wins"),
    # --- training
    Variable("SEED", "train eval", "1", "data order and sampling", "data.seed", whole(0), also=lambda seed: [f"{ROLLOUT}.seed={seed}"]),
    Variable("TRAIN_BATCH_SIZE", "train", "128", "questions of a step", "data.train_batch_size", whole(1)),
    Variable("VAL_BATCH_SIZE", "train eval", "all", "questions that a validation samples together", "data.val_batch_size", whole(1),
             "release 128: the rollout engine schedules them itself"),
    Variable("PPO_MINI_BATCH_SIZE", "train", "32", "questions of an update", "actor_rollout_ref.actor.ppo_mini_batch_size", whole(1)),
    Variable("PPO_MICRO_BATCH_SIZE_PER_GPU", "train", "by tokens", "rollouts of a forward pass in the update; turns off batches by tokens",
             "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", whole(1), "release 4: 16,384 tokens at a time",
             also=lambda _: ["actor_rollout_ref.actor.use_dynamic_bsz=false"]),
    Variable("LOGPROB_MICRO_BATCH_SIZE_PER_GPU", "train", "by tokens", "the same for the old log-probs",
             f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", whole(1), "release 8", also=lambda _: [f"{ROLLOUT}.log_prob_use_dynamic_bsz=false"]),
    Variable("REF_LOGPROB_MICRO_BATCH_SIZE_PER_GPU", "train", "by tokens", "the same for the reference policy",
             "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu", whole(1), "release 8",
             also=lambda _: ["actor_rollout_ref.ref.log_prob_use_dynamic_bsz=false"]),
    Variable("MAX_PROMPT_LENGTH", "train eval", "1024", "tokens of a prompt, tools included", "data.max_prompt_length", whole(1)),
    Variable("MAX_RESPONSE_LENGTH", "train eval", "6144", "tokens of all turns and tool results of a rollout", "data.max_response_length", whole(1),
             "release 2048: four results of 2,048 characters alone fill that"),
    Variable("MAX_ASSISTANT_TURNS", "train eval", "5", "turns of a rollout", f"{ROLLOUT}.multi_turn.max_assistant_turns", whole(1)),
    Variable("MAX_TOOL_RESPONSE_LENGTH", "train eval", "2048", "characters of a tool's result, cut on the right",
             f"{ROLLOUT}.multi_turn.max_tool_response_length", whole(1)),
    Variable("ROLLOUT_N", "train", "4", "rollouts of a question", f"{ROLLOUT}.n", whole(2, 4096)),
    Variable("ROLLOUT_TEMPERATURE", "train", "1.0", "sampling temperature of training", f"{ROLLOUT}.temperature", number(0.01, 100)),
    Variable("ROLLOUT_TP_SIZE", "train eval", "1", "GPUs that share one copy of the rollout engine", f"{ROLLOUT}.tensor_model_parallel_size", whole(1, 1024),
             "release 4: a 4B or 8B model fits one GPU, and more copies generate faster", gpu=True),
    Variable("ROLLOUT_GPU_MEM", "train eval", "0.5, eval 0.6", "share of each GPU's memory for the rollout engine", f"{ROLLOUT}.gpu_memory_utilization", share, gpu=True),
    Variable("KL_LOSS_COEF", "train", "0.005", "weight of the KL loss against the start model", "actor_rollout_ref.actor.kl_loss_coef", number(0),
             also=lambda value: [f"actor_rollout_ref.actor.use_kl_loss={str(float(value) > 0).lower()}"]),
    Variable("SIOP_LAMBDA", "train", "0.5", "see `siop_lambda`", "algorithm.siop_lambda", number(0, 1)),
    Variable("SIOP_ETA", "train", "1.0", "see `siop_eta`", "algorithm.siop_eta", number(0)),
    Variable("SIOP_NUM_REFS", "train", "3", "see `siop_num_refs`", "algorithm.siop_num_refs", whole(1)),
    Variable("TOTAL_EPOCHS", "train", "1", "passes over the training data", "trainer.total_epochs", whole(1)),
    Variable("SAVE_FREQ", "train", "10", "steps between checkpoints, of which the last two are kept; -1: only at the end", "trainer.save_freq", whole(-1)),
    Variable("TEST_FREQ", "train", "50", "steps between validations; -1: none", "trainer.test_freq", whole(-1)),
    Variable("VAL_BEFORE_TRAIN", "train", "false", "validate before the first step", "trainer.val_before_train", choice("true", "false", "True", "False")),
    Variable("RESUME_MODE", "train", "auto", "auto: go on from the last checkpoint; disable: start anew", "trainer.resume_mode", choice("auto", "disable"),
             "release disable: the same command goes on after a stop"),
    Variable("SIOP_STOP_GRACE_S", "train quickstart", "30", "seconds that a run goes on after Ctrl-C or SIGTERM if its step can be saved in them; 0: stops at once", check=whole(0)),
    Variable("EVAL_N", "eval", "1", "samples of a question, for avg@n and pass@n; above 1 needs `EVAL_TEMPERATURE`", f"{ROLLOUT}.val_kwargs.n", whole(1, 4096)),
    Variable("EVAL_TEMPERATURE", "eval", "0: greedy", "sampling temperature of the evaluation", f"{ROLLOUT}.val_kwargs.temperature", number(0, 100),
             also=lambda value: [f"{ROLLOUT}.val_kwargs.do_sample={str(float(value) > 0).lower()}"]),
    # --- scorer
    Variable("SIOP_MODEL", "scorer", "required", "scorer LM; `none`: clusters and entailment only, for `siop_scorer=policy`", "--model"),
    Variable("SIOP_NLI_MODEL", "scorer", "`microsoft/deberta-v2-xlarge-mnli`; on a CPU none: answers are compared by their words",
             "NLI classifier, which clusters answers and weighs evidence; `none`: by their words", "--nli-model", why="on a CPU 900M parameters are too slow"),
    Variable("SIOP_NLI_DEVICE", "scorer", "the scorer's", "cpu, cuda: where the NLI classifier runs", "--nli-device", choice("cpu", "cuda"),
             "release cpu: on GPUs it is not the bottleneck"),
    Variable("SIOP_HOST", "scorer", "127.0.0.1", "address to listen on; 0.0.0.0 for other nodes", why="release 0.0.0.0: not open to the network unasked"),
    Variable("SIOP_PORT", "scorer", "8390", "port", check=whole(1, 65535)),
    Variable("SIOP_CUDA_DEVICES", "scorer", "`CUDA_VISIBLE_DEVICES`", "GPUs of the scorer, as 6,7"),
    Variable("SIOP_NUM_GPUS", "scorer", "all of these", "GPUs to use, `SIOP_TP_SIZE` for each worker, 0 = CPU", check=whole(0, 65536), why="release 8: counted"),
    Variable("SIOP_TP_SIZE", "scorer", "1", "GPUs that share one model (vLLM)", "--tensor-parallel-size", whole(1, 1024)),
    Variable("SIOP_GPU_MEM", "scorer", "0.15 with vLLM, else no limit", "share of each GPU's memory that the model may take", "--gpu-memory", share),
    Variable("SIOP_MAX_MODEL_LEN", "scorer", "8192 on GPUs, else the model's", "longest prompt + response + reference in tokens", "--max-model-len", whole(1)),
    Variable("SIOP_ENGINE", "scorer", "auto", "transformers, vllm; auto: vLLM on GPUs where it is installed", "--engine", choice("auto", "transformers", "vllm")),
    Variable("SIOP_DTYPE", "scorer", "auto", "float32, bfloat16, float16; auto: float32 on CPU, the checkpoint's type on GPU", "--dtype", choice("auto", "float32", "bfloat16", "float16")),
    Variable("SIOP_LORA_PATH", "scorer", "none", "LoRA adapter on top of the scorer model", "--lora-path"),
    Variable("SIOP_START_TIMEOUT", "scorer quickstart", "600", "seconds to wait until it is healthy", check=whole(1)),
    Variable("VLLM_CPU_KVCACHE_SPACE", "scorer", "2", "GiB of cache, vLLM on a CPU", check=whole(1, 65536)),
    # --- retriever
    Variable("RETRIEVER_CORPUS_DIR", "retriever", "none", "folder with `wiki-18.jsonl` and, for e5, `e5_Flat.index`"),
    Variable("RETRIEVER_CORPUS_FILE", "retriever", "`$RETRIEVER_CORPUS_DIR/wiki-18.jsonl`; toy world's", 'JSONL, `{"id", "contents"}` per line'),
    Variable("RETRIEVER_NAME", "retriever", "e5 where `RETRIEVER_INDEX_FILE` is, else bm25", "bm25: by words; e5: by vectors, of another encoder with `RETRIEVER_MODEL`; your own server takes any", why="release e5, which needs an encoder and hours of a GPU"),
    Variable("RETRIEVER_INDEX_DIR", "retriever", "beside the corpus", "folder of the index, built once; alone, an index as it is"),
    Variable("RETRIEVER_HOST", "retriever", "127.0.0.1", "address to listen on; 0.0.0.0 for other nodes", why="release 0.0.0.0: not open to the network unasked"),
    Variable("RETRIEVER_PORT", "retriever", "8000", "port", check=whole(1, 65535)),
    Variable("RETRIEVER_TOPK", "retriever", "3", "passages per query if the request names none, 1 to 100", check=whole(1)),
    Variable("RETRIEVER_START_TIMEOUT", "retriever quickstart eval", "1800", "seconds to wait until it answers; eval: that of `--toy-seed`", check=whole(1)),
    Variable("RETRIEVER_CONDA_ENV", "retriever", "`CONDA_ENV`", "conda environment of the retriever", why="release retriever: what is activated wins"),
    Variable("RETRIEVER_GPUS", "retriever", "`CUDA_VISIBLE_DEVICES`", "GPUs of dense retrieval, or of your own server, as 0,1"),
    Variable("RETRIEVAL_SERVER_SCRIPT", "retriever", "none", "your own server in place of ours, started with Search-R1's arguments: --index_path, --corpus_path, --topk, --retriever_name, --retriever_model, --faiss_gpu"),
    Variable("RETRIEVER_INDEX_FILE", "retriever", "`$RETRIEVER_CORPUS_DIR/e5_Flat.index` if it is there", "vectors of the corpus as Search-R1 publishes them, imported once; or the index of your own server"),
    Variable("RETRIEVER_MODEL", "retriever", "intfloat/e5-base-v2", "encoder of dense retrieval or of your own server: folder or hub id"),
    Variable("RETRIEVER_FAISS_GPU", "retriever", "1 where there are GPUs", "0: dense retrieval on the CPU; 1: your own server gets --faiss_gpu", check=whole(0, 1)),
    # --- quickstart
    Variable("GAME_DIR", "quickstart", "`runs/games/GAME`", "small game of `--game` (see `python -m examples.games.build --help`)"),
    Variable("QUICKSTART_STEPS", "quickstart", "60", "training steps", check=whole(1)),
    Variable("PYTHON", "quickstart", "the first found on `PATH`", "interpreter for the creation of `.venv`, 3.10 to 3.12"),
)  # fmt: skip

# Variables of the first release, or of this project before it took the release's names: what to use instead.
REPLACED = {
    "TRAIN_FILES": "use TRAIN_FILE",
    "VAL_FILES": "use VAL_FILE",
    "OUT_DIR": "use OUTPUT_DIR",
    "EXPERIMENT": "use EXPERIMENT_NAME",
    "N_GPUS": "use N_GPUS_PER_NODE",
    "RETRIEVER_INDEX_PATH": "use RETRIEVER_INDEX_FILE",
    "GENERATE_TIMEOUT_S": "unset it: verl 0.9.1 has no time limit for one generation, MAX_RESPONSE_LENGTH bounds it",
    "SERPER_MOCK": "use SERPER_CACHE_DIR, whose results are replayed without a key",
}
# Read by another program of the same name, so that only a launcher that would use it refuses it.
_REPLACED_IN = {"RETRIEVER_INDEX_PATH": "retriever", "GENERATE_TIMEOUT_S": "train eval", "SERPER_MOCK": "train eval"}

# Read by others, and close to one of ours.
_OTHERS = {"PYTHONPATH"}

# Of training alone: an evaluation says that it does not use them.
_NO_EFFECT = {"ROLLOUT_TEMPERATURE": "EVAL_TEMPERATURE"}


def of(program: str) -> list[Variable]:
    """The rows that a program reads."""
    return [row for row in TABLE if program in row.programs.split()]


def misspelt(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that nothing reads and that are almost one of the table's: name -> what was probably meant."""
    names = {row.name for row in TABLE} | REPLACED.keys()
    return {
        name: meant[0]
        for name, value in environment.items()
        if value and name not in names and name not in _OTHERS
        # Of names as short as NNODES one letter may be missing or too many.
        if (meant := difflib.get_close_matches(name, names, n=1, cutoff=0.88))
    }


def _on_cpu(environment: Mapping[str, str]) -> bool:
    """As the launchers choose the device; ``SEEN_GPUS`` is what they count."""
    return (environment.get("N_GPUS_PER_NODE") or environment.get("SEEN_GPUS")) == "0"


def problem(program: str, environment: Mapping[str, str]) -> str | None:
    """The first variable that is wrong or means nothing, as a message that names what is allowed."""
    for name, instead in REPLACED.items():
        if environment.get(name) and program in _REPLACED_IN.get(name, " ".join(PROGRAMS)).split():
            return f"{name}={environment[name]} is not used here; {instead}"
    for name, meant in misspelt(environment).items():
        return f"{name} is set, but nothing here reads it; did you mean {meant}? (If it belongs to something else, unset it)"
    for row in of(program):
        value = environment.get(row.name, "")
        allowed = row.check(value) if row.check and value else None
        if allowed:
            return f"{row.name}={value} is not allowed: {allowed}"
        if "\n" in value:
            return f"{row.name} is not allowed: it has a line break"
        if value and row.gpu and _on_cpu(environment):
            return f"{row.name}={value} has no effect on a CPU (no GPU is seen, or N_GPUS_PER_NODE=0); unset it"
        if "${" in value and row.target and not row.target.startswith("--"):
            return f"{row.name}={value} is not allowed: ${{ begins an interpolation of the configuration"
    samples, temperature = (environment.get(name) or "0" for name in ("EVAL_N", "EVAL_TEMPERATURE"))
    if program == "eval" and int(samples) > 1 and float(temperature) == 0:
        return (
            f"EVAL_N={samples} is not allowed: with EVAL_TEMPERATURE={temperature} decoding is greedy, and all samples of a "
            "question would be equal; set EVAL_TEMPERATURE above 0, as 1"
        )
    return None


def notes(program: str, environment: Mapping[str, str]) -> list[str]:
    """What is set for training and has no effect in this program."""
    if program != "eval":
        return []
    mine = {row.name for row in of("eval")}
    training = [row.name for row in of("train") if row.name not in mine and row.target and environment.get(row.name)]
    return [
        f"{name} has no effect on an evaluation" + (f"; use {_NO_EFFECT[name]}" if name in _NO_EFFECT else "")
        for name in training
    ]


def _is_plain(text: str) -> bool:
    """Whether Hydra reads this as the text that it is, without quotes: no number, no null, nothing of its grammar."""
    if not re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./:@%+-]*", text) or text.lower() in ("null", "true", "false"):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def in_quotes(text: str) -> str:
    """A text as Hydra reads it in quotes: there a backslash is one, but for those before a quote."""
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def quoted(text: str) -> str:
    """A text as Hydra reads it back, without quotes where it needs none."""
    return text if _is_plain(text) else in_quotes(text)


def _files(value: str) -> str:
    """A path, or ``[a,b]`` with several."""
    if not (value.startswith("[") and value.endswith("]")):
        return quoted(value)
    return "[" + ",".join(quoted(path.strip()) for path in value[1:-1].split(",")) + "]"


def overrides(program: str, environment: Mapping[str, str]) -> list[str]:
    """What the set variables say to Hydra, or to the server as options."""
    found = []
    for row in of(program):
        value = environment.get(row.name, "")
        if not value or not row.target or (row.gpu and _on_cpu(environment)):
            continue
        if row.target.startswith("--"):
            found += [row.target, value]
            continue
        if row.check is loggers:
            value = f"[{','.join(_names(value))}]"
        if row.check is None or row.check is file_name:
            value = _files(value) if row.name in ("TRAIN_FILE", "VAL_FILE") else quoted(value)
        found += [f"{row.target}={value}", *(row.also(value) if row.also else [])]
    return found


def _plain(text: str) -> str:
    return re.sub(r"\[([^]]*)\]\(#[^)]*\)", r"\1", text).replace("`", "")


def help_text(program: str) -> str:
    """The table of a program for a terminal."""
    lines = ["Environment:"]
    width = max(len(row.name) for row in of(program)) + 2
    for row in of(program):
        text = f"{_plain(row.meaning)} ({_plain(row.default)})"
        lines += textwrap.wrap(text, 118, initial_indent=f"  {row.name:<{width}}", subsequent_indent=" " * (width + 2))
    return "\n".join(lines)


def readme() -> str:
    """The table of all programs in Markdown."""
    lines = ["| variable | default | for | meaning | why not the release's |", "|---|---|---|---|---|"]
    for row in TABLE:
        who = "all" if len(row.programs.split()) == len(PROGRAMS) else ", ".join(row.programs.split())
        lines.append(f"| `{row.name}` | {row.default} | {who} | {row.meaning} | {row.why} |")
    return "\n".join(lines)


def shown(program: str, environment: Mapping[str, str]) -> str:
    """Every variable with its value, or its default in brackets; no secrets."""
    width = max(len(row.name) for row in of(program)) + 2
    lines = []
    for row in of(program):
        value = environment.get(row.name, "")
        text = f"({_plain(row.default)})" if not value else "set" if row.secret else value
        lines.append(f"  {row.name:<{width}}{text}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    action, program = (*arguments, "", "")[:2]
    if action == "readme":
        print(readme())
        return 0
    if action not in ("check", "overrides", "show", "foreign", "help") or program not in PROGRAMS:
        print(__doc__, file=sys.stderr)
        return 2
    if action == "check":
        if message := problem(program, os.environ):
            print(f"error: {message}", file=sys.stderr)
            return 1
        for note in notes(program, os.environ):
            print(f"note: {note}")
    elif action == "overrides":
        print("\n".join(overrides(program, os.environ)))
    elif action == "foreign":
        print("\n".join(row.name for row in TABLE if program not in row.programs.split()))
    else:
        print(help_text(program) if action == "help" else shown(program, os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
