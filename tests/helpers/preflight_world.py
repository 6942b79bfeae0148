"""A run in which everything is right, of which the tests of the checks before it spoil one thing each."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from scorer_process import free_port
from verl.trainer.siop.preflight import SEARCH, check_before_start

Parts = dict[str, str]
ROW: dict[str, Any] = {
    "data_source": "test",
    "prompt": [{"role": "user", "content": "who?"}],
    "reward_model": {"style": "rule", "ground_truth": {"target": ["me"]}},
}
MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
# Of the family of Qwen3: it renders tools, calls and results, and knows no other roles.
TOOL_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{%- endif %}{% for m in messages %}"
    "{%- if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{%- elif m.role in ('system', 'user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n"
    "{%- else %}{{ raise_exception('unexpected role ' + m.role) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES = (
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>"
)
CODER = (
    "<tool_call>\n<function={{ call.function.name }}>\n{% for key, value in call.function.arguments.items() %}"
    "<parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
SEARCH_TOOL = {
    "class_name": "verl.tools.local_search_tool.LocalSearchTool",
    "config": {"type": "native", "max_chars": 200},
}


def config_of(*overrides: str) -> DictConfig:
    """The configuration of a run on a CPU."""
    with initialize_config_module("verl.trainer.siop.config", version_base=None):
        return compose("siop_trainer", overrides=["hardware=cpu", *overrides])


@functools.cache
def _default() -> DictConfig:
    return config_of()


def changed(parts: Parts, *overrides: str) -> DictConfig:
    """The configuration with ``parts`` and ``overrides``, composed once for all tests."""
    config = copy.deepcopy(_default())
    with open_dict(config):
        for override in (*(f"{key}={value}" for key, value in parts.items()), *overrides):
            key, _, value = override.removeprefix("+").partition("=")
            OmegaConf.update(config, key, yaml.safe_load(value))
    return config


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))  # pyarrow takes those of the first row alone
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    return str(path)


def write_tools(path: Path, *tools: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump({"tools": list(tools)}))
    return str(path)


def right_parts(folder: Path, model: Path) -> Parts:
    """Overrides of a run without tools and without a scorer."""
    data = write_rows(folder / "data.parquet", [ROW] * 3)
    return {
        "actor_rollout_ref.model.path": str(model),
        "data.train_files": data,
        "data.val_files": data,
        "data.max_prompt_length": "64",
        "data.train_batch_size": "2",
        f"{MULTI_TURN}.tool_config_path": write_tools(folder / "tools.yaml"),
        "algorithm.siop_scorer_url": f"http://127.0.0.1:{free_port()}",
        "algorithm.siop_scorer_timeout_s": "0.5",
        "trainer.default_local_dir": str(folder / "output"),
    }


def model_with_template(model: Path, folder: Path, template: str) -> str:
    """A copy of a model with another chat template."""
    copy = folder / "templated"
    shutil.copytree(model, copy, dirs_exist_ok=True)
    (copy / "chat_template.jinja").write_text(template)
    return str(copy)


def check(parts: Parts, *overrides: str, **changes: Any) -> None:
    """All checks but that of the retriever, which is not there; ``a__b=c`` stands for ``a.b=c``."""
    values = {key.replace("__", "."): str(x) for key, x in changes.items()}
    check_before_start(changed({**parts, **values}, *overrides), without=[SEARCH])


@contextmanager
def health_of_scorer(*, noise: float | None = 0.0, **health: Any) -> Iterator[str]:
    """The address of something that answers ``/health`` as a healthy scorer with these fields does.

    It scores every reference alike, in a request of several rollouts by ``noise`` more; with None it has no other page.
    """

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"status": "healthy", "num_workers": 1, **health})

        def do_POST(self) -> None:
            if noise is None:
                return self.send_error(501)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            rollouts = json.loads(body)["rollouts"]
            score = -1.5 + noise * (len(rollouts) > 1)
            support = [[[score for _ in item["references"]] for _ in item["boundaries"]] for item in rollouts]
            self._answer({"support": support, "computed_tokens": 1, "requested_tokens": 1, "elapsed_ms": 1.0})

        def _answer(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("X-Request-Id", self.headers.get("X-Request-Id", ""))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
