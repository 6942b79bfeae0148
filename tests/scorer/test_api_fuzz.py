"""Malformed and hostile requests to a real scoring service: none gets a 500, and it stays healthy."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Iterator

import httpx
import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from known_requests import KnownRequests
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from scorer_process import ScorerProcess
from tiny_models import VOCAB_SIZE, save_causal_lm, save_classifier
from verl.utils.siop.scoring_client import ScoringClient

JSON = {"Content-Type": "application/json"}
MAX_BODY = 4 * 2**20
POSTS = ("/support", "/score", "/cluster", "/nli_score")
CASES = 130  # of each endpoint, valid and not


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_causal_lm(root / "lm"), save_classifier(root / "nli")


@pytest.fixture(scope="module")
def scorer(models, tmp_path_factory) -> Iterator[ScorerProcess]:
    process = ScorerProcess(
        f"--model {models[0]} --nli-model {models[1]} --max-body-mb {MAX_BODY / 2**20}".split(),
        tmp_path_factory.mktemp("scorer") / "scorer.log",
    )
    try:
        process.wait_healthy(180)
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def known(models) -> KnownRequests:
    return KnownRequests(*models)


@pytest.fixture(autouse=True)
def healthy_and_right_afterwards(scorer, known) -> Iterator[None]:
    """The service has not crashed, lost a worker or logged an exception, and its scores are right."""
    workers = scorer.worker_pids() + scorer.worker_pids("Nli")
    yield
    assert httpx.get(f"{scorer.url}/health", timeout=60).json()["status"] == "healthy"
    assert scorer.worker_pids() + scorer.worker_pids("Nli") == workers
    log = scorer.log.read_text()
    assert "Traceback" not in log and " died" not in log and not any(f"' {status} " in log for status in (500, 503))

    async def check() -> None:
        async with ScoringClient(scorer.url, attempts=1, timeout_s=60) as client:
            for seed in range(4):
                await known.mixed(seed).check(client)

    asyncio.run(check())


def fit(body: dict) -> None:
    """Bring token ids, boundaries and ranges, which the page does not limit, to what the model takes.

    Integers too: to a JSON schema 1.0 is one.
    """

    def fold(ids: list[int]) -> list[int]:
        return [int(token_id) % VOCAB_SIZE for token_id in ids[:20]]

    for rollout in body.get("rollouts", []):
        rollout["prompt_ids"] = fold(rollout["prompt_ids"]) or [1]
        rollout["response_ids"] = fold(rollout["response_ids"])
        rollout["boundaries"] = [int(at) % (len(rollout["response_ids"]) + 1) for at in rollout["boundaries"]]
        for reference in rollout["references"]:
            reference["token_ids"] = fold(reference["token_ids"])
            reference["start"] = int(reference["start"]) % len(reference["token_ids"])
            reference["end"] = len(reference["token_ids"])
    for item in body.get("items", []):
        item["prompt_ids"], item["response_ids"] = fold(item["prompt_ids"]) or [1], fold(item["response_ids"])
        item["ref_start"] = int(item["ref_start"]) % len(item["response_ids"])
        item["ref_end"] = len(item["response_ids"])


def fuzz(operation, mode: GenerationMode) -> Counter[int]:
    """Send cases of an endpoint; returns how many had which status."""
    counts: Counter[int] = Counter()
    session = requests.Session()
    session.trust_env = False

    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        if mode is GenerationMode.POSITIVE and operation.method == "post" and counts.total() % 2:
            fit(case.body)
        response = case.call(session=session, timeout=120)
        counts[response.status_code] += 1
        case.validate_response(response, checks=[not_a_server_error])

    check()
    return counts


def test_schemathesis(scorer):
    """Cases made from the OpenAPI page, for each endpoint such as fit it and such as do not; the same on each run."""
    schema = schemathesis.openapi.from_url(f"{scorer.url}/openapi.json", timeout=60)
    statuses = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        # Nothing can be wrong with a GET that takes nothing.
        modes = GenerationMode if operation.method == "post" else [GenerationMode.POSITIVE]
        statuses[operation.path] = sum((fuzz(operation, mode) for mode in modes), Counter())
    print(statuses)
    assert set(POSTS) <= set(statuses)
    for path in POSTS:
        # Both what fits the page and what does not was there.
        assert statuses[path][200] > 20 and statuses[path][422] > 20, statuses
    assert sum(counts.total() for counts in statuses.values()) >= 1000
    assert all(status < 500 for counts in statuses.values() for status in counts)


def rollout(**changes) -> dict:
    reference = {"token_ids": [5, 6], "start": 0, "end": 2}
    data = {"prompt_ids": [1, 2], "response_ids": [3, 4], "boundaries": [0, 2], "references": [reference], **changes}
    return {"rollouts": [data]}


def raw(data) -> bytes:
    return json.dumps(data).encode()


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


LONE_SURROGATE = rb'"\ud800"'
HOSTILE = {
    "empty": ("/support", b"", {422}),
    "null": ("/support", b"null", {422}),
    "number": ("/cluster", b"1", {422}),
    "deeply nested": ("/support", nested(100_000), {422}),
    "deeply nested inside": ("/score", b'{"items": ' + nested(100_000) + b"}", {422}),
    "deeply nested object": ("/nli_score", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, {422}),
    "unclosed": ("/cluster", b"[" * 100_000, {422}),
    "huge token id": ("/support", raw(rollout(prompt_ids=[10**400])), {422}),
    "token id with more digits than Python converts": (
        "/support",
        raw(rollout()).replace(b"[1, 2]", b"[" + b"9" * 10_000 + b"]"),
        {422},
    ),
    "huge boundary": ("/support", raw(rollout(boundaries=[10**400])), {422}),
    "huge range": (
        "/score",
        raw({"items": [{"prompt_ids": [1], "response_ids": [2], "ref_start": 0, "ref_end": 10**400}]}),
        {422},
    ),
    "NaN": ("/support", raw(rollout(prompt_ids=[float("nan")])), {422}),
    "Infinity": ("/support", raw(rollout(boundaries=[float("inf")])), {422}),
    "1e999": ("/support", raw(rollout()).replace(b"[0, 2]", b"[1e999]"), {422}),
    "fraction": ("/support", raw(rollout(boundaries=[0.5])), {422}),
    "boolean": ("/support", raw(rollout(boundaries=[True])), {422}),
    "negative boundary": ("/support", raw(rollout(boundaries=[-1])), {422}),
    "negative token id": ("/support", raw(rollout(response_ids=[-1, 4])), {422}),
    "token id beyond the vocabulary": ("/support", raw(rollout(prompt_ids=[2**31 - 1])), {422}),
    "no boundary": ("/support", raw(rollout(boundaries=[])), {422}),
    "no context": ("/support", raw(rollout(prompt_ids=[])), {422}),
    "no rollout": ("/support", raw({"rollouts": []}), {200}),
    "a million boundaries": ("/support", raw(rollout(boundaries=[0] * 10**6)), {413, 422}),
    "a million items": ("/score", b'{"items": [' + b"{}," * (10**6 - 1) + b"{}]}", {422}),
    "a million pairs": ("/nli_score", b'{"pairs": [' + b"0," * (10**6 - 1) + b"0]}", {422}),
    "a million tokens": ("/support", raw(rollout(prompt_ids=[1] * 10**6)), {413}),
    "empty texts": ("/nli_score", raw({"pairs": [{"premise": "", "hypothesis": ""}]}), {422}),
    "repeated keys": (
        "/nli_score",
        b'{"pairs": [{"premise": "a", "premise": "b", "hypothesis": "c"}]}',
        {200},
    ),
    "repeated lists": ("/nli_score", b'{"pairs": [], "pairs": [{"premise": "a", "hypothesis": "b"}]}', {200, 422}),
    "a million token ids that are none": ("/support", raw(rollout(prompt_ids=["a"] * 10**6)), {413, 422}),
    "invalid UTF-8": ("/nli_score", b'{"pairs": [{"premise": "\xff\xfe", "hypothesis": "b"}]}', {400, 422}),
    "UTF-16": ("/nli_score", json.dumps({"pairs": []}).encode("utf-16"), {200, 400, 422}),
    "zero bytes": ("/support", b"\0" * 1000, {400, 422}),
    "lone surrogate": ("/nli_score", b'{"pairs": [{"premise": %s, "hypothesis": "b"}]}' % LONE_SURROGATE, {422}),
    "lone surrogate in an answer": (
        "/cluster",
        b'{"groups": [{"group_id": "a", "question": "b", "answers": ["c", %s]}]}' % LONE_SURROGATE,
        {422},
    ),
    "lone surrogate in an id": (
        "/cluster",
        b'{"groups": [{"group_id": %s, "question": "b", "answers": ["c"]}]}' % LONE_SURROGATE,
        {422},
    ),
    "lone surrogate in a key": ("/cluster", b"{%s: 1}" % LONE_SURROGATE, {422}),
    "path in an id": (
        "/cluster",
        raw({"groups": [{"group_id": "../../etc/passwd\0%00", "question": "q", "answers": ["a\0", "\x1b[31m"]}]}),
        {200},
    ),
    "right-to-left, zero-width and emoji": (
        "/cluster",
        raw({"groups": [{"group_id": "", "question": "", "answers": ["\u202e", "\u200d", "\U0001f937\u200d", ""]}]}),
        {200},
    ),
    "text that is too long": ("/nli_score", raw({"pairs": [{"premise": "a" * 200_001, "hypothesis": "b"}]}), {422}),
    "hypothesis that is too long for the model": (
        "/nli_score",
        raw({"pairs": [{"premise": "a", "hypothesis": "b" * 5_000}]}),
        {413},
    ),
    "over the body limit": ("/support", b" " * (MAX_BODY + 1), {413}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body(scorer, name):
    path, content, allowed = HOSTILE[name]
    response = httpx.post(f"{scorer.url}{path}", content=content, headers=JSON, timeout=120)
    assert response.status_code in allowed, response.text[:300]
    assert len(response.content) < 10_000
    response.json()


def test_the_last_of_repeated_keys_counts(scorer):
    path, content, _ = HOSTILE["repeated keys"]
    plain = raw({"pairs": [{"premise": "b", "hypothesis": "c"}]})
    scores = [
        httpx.post(f"{scorer.url}{path}", content=body, headers=JSON, timeout=60).json()["scores"]
        for body in (content, plain)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/xml", "multipart/form-data", "application/json; charset=x"]
)
def test_another_content_type_is_read_as_json_or_refused(scorer, kind):
    response = httpx.post(
        f"{scorer.url}/support", content=b'{"rollouts": []}', headers={"Content-Type": kind}, timeout=60
    )
    assert response.status_code in (200, 415, 422)


def exchange(scorer, message: bytes) -> int:
    """Status of the answer to raw bytes, 0 where the connection is closed without one."""
    with socket.create_connection(("127.0.0.1", scorer.port), timeout=60) as connection:
        connection.sendall(message)
        line = connection.makefile("rb").readline().split()
        return int(line[1]) if line else 0


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n", 400),  # the start of TLS
        (b"G\0T /health HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", 400),
        (b"GET /%ff%00/../../etc/passwd HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"GET " + b"/a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"POST /support HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /support HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /support HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
        (b"POST /support HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST /support HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", 405),
    ],
)
def test_what_is_not_proper_http(scorer, message, status):
    assert exchange(scorer, message) == status


def test_a_body_without_length_ends_at_the_limit(scorer):
    def stream():
        for _ in range(100):
            yield b" " * 2**20

    front = psutil.Process(scorer.process.pid)
    before = front.memory_info().rss
    try:
        status = httpx.post(f"{scorer.url}/support", content=stream(), timeout=60).status_code
    except httpx.WriteError:  # closed before all was sent
        status = 413
    assert status == 413
    assert front.memory_info().rss - before < 50 * 2**20


def test_connections_that_never_finish_block_nobody(scorer, known):
    """Half-sent headers and half-sent bodies stay open while others are served."""
    head = b"POST /support HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    connections = [socket.create_connection(("127.0.0.1", scorer.port), timeout=60) for _ in range(300)]
    try:
        for index, connection in enumerate(connections):
            # Bodies on the way hold places of the limit on requests, so there are fewer of them.
            connection.sendall(head + b"Content-Length: 100\r\n\r\n{" if index < 30 else head)

        async def check() -> None:
            async with ScoringClient(scorer.url, attempts=1, timeout_s=60) as client:
                await asyncio.gather(*(known.mixed(seed).check(client) for seed in range(20)))

        asyncio.run(check())
    finally:
        for connection in connections:
            connection.close()
