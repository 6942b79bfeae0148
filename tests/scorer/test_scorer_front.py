"""The scoring service's front without its processes: bodies parsed beside the event loop, limits, OpenAPI, help."""

from __future__ import annotations

import asyncio
import json
import re
import threading

import httpx
import numpy as np
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from verl.utils.siop.errors import SequenceTooLong
from verl.utils.siop.http import json_body
from verl.utils.siop.http.json_body import MAX_ERRORS, parse_body
from verl.utils.siop.scorer import app as scorer_app
from verl.utils.siop.scorer.app import create_app
from verl.utils.siop.scorer.engines.base import EngineInfo, SupportResult
from verl.utils.siop.scorer.pool import NoWorker
from verl.utils.siop.scorer.settings import parser
from verl.utils.siop.scorer.wire import ClusterBody, NliBody, ScoreBody, SupportBody
from verl.utils.siop.scorer.workers import NliResult, WorkerInfo

ROLLOUT = {
    "prompt_ids": [1, 2],
    "response_ids": [3, 4, 5],
    "boundaries": [0, 3],
    "references": [{"token_ids": [6, 7], "start": 0, "end": 2}],
}
JSON = json.dumps(ROLLOUT).encode()
ITEM = {"prompt_ids": [1], "response_ids": [2, 3], "ref_start": 0, "ref_end": 2}
GROUP = {"group_id": 'a"]}', "question": "wh\\y? {[", "answers": ["}],", '\\"', "é漢"]}
PAIR = {"premise": "p", "hypothesis": "[h]"}
BODIES = {
    SupportBody: {
        "rollouts": [ROLLOUT, {**ROLLOUT, "response_ids": [], "boundaries": [0, 0], "openings": [[], [8, 9]]}]
    },
    ScoreBody: {"items": [ITEM, ITEM, ITEM]},
    ClusterBody: {"groups": [GROUP, {**GROUP, "strict": False}]},
    NliBody: {"pairs": [PAIR]},
}
PATHS = {SupportBody: "/support", ScoreBody: "/score", ClusterBody: "/cluster", NliBody: "/nli_score"}


class Pool:
    """Workers that answer with zeros."""

    def __init__(self) -> None:
        self.info: WorkerInfo | None = WorkerInfo(EngineInfo("zeros", "zeros", 100_000, 100_000), "lexical")
        self.num_workers = self.num_up = 1
        self.num_nli_workers = self.num_nli_up = 0
        self.is_complete = True

    async def support(self, rollouts):
        return SupportResult([[[0.0] * len(r.probes) for _ in r.boundaries] for r in rollouts], 0, 0)

    async def cluster(self, groups):
        return NliResult([[0] * len(group.answers) for group in groups], asked=7, computed=5)

    async def entailment(self, pairs):
        return NliResult([0.0 for _ in pairs])


def call(*requests, app=None, **limits):
    """Responses to (path, content) POSTs, one after the other."""

    async def run():
        transport = httpx.ASGITransport(app or create_app(Pool(), **limits)[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://scorer") as http:
            headers = {"Content-Type": "application/json"}
            return [await http.post(path, content=content, headers=headers) for path, content in requests]

    return asyncio.run(run())


def plain(value):
    if isinstance(value, BaseModel):
        return {name: plain(part) for name, part in value}
    return [plain(part) for part in value] if isinstance(value, (list, np.ndarray)) else value


def as_whole(body, model):
    try:
        return plain(model.model_validate_json(body))
    except ValidationError:
        return None


def in_parts(body, model, **limits):
    try:
        return plain(parse_body(body, model, **{"max_items": 100, "max_item_tokens": 1000, **limits}))
    except RequestValidationError as error:
        assert error.errors()
        return None


@pytest.mark.parametrize("model", BODIES)
@pytest.mark.parametrize("indent", [None, 2])
def test_parts_are_what_the_whole_is(model, indent):
    for content in (BODIES[model], {next(iter(BODIES[model])): []}):
        for ascii_only in (True, False):
            body = json.dumps(content, indent=indent, ensure_ascii=ascii_only).encode()
            assert in_parts(body, model) == as_whole(body, model) is not None
    (field,) = BODIES[model]
    values = getattr(parse_body(body, model, 100, 100), field)
    assert all(type(value) is type(values[0]) for value in values)


PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b" ",
    b"1",
    b"-",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"\xff",
    b"",
]


@settings(max_examples=600)
@given(st.data(), st.sampled_from(list(BODIES)))
def test_whatever_is_not_valid_as_a_whole_is_not_in_parts(data, model):
    body = json.dumps(BODIES[model], indent=data.draw(st.sampled_from([None, 1]))).encode()
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(body)))
        size = data.draw(st.integers(0, 3))
        body = body[:at] + data.draw(st.sampled_from(PIECES)) + body[at + size :]
    assert in_parts(body, model) == as_whole(body, model)


@pytest.mark.parametrize(
    ("content", "loc", "message"),
    [
        (
            b'{"rollouts": [%s, {"prompt_ids": [1]}]}' % json.dumps(ROLLOUT).encode(),
            ["rollouts", 1, "response_ids"],
            "",
        ),
        (b'{"rollouts": [%s, 3]}' % json.dumps(ROLLOUT).encode(), ["rollouts", 1], "object"),
        (b'{"rollouts": [], "rollouts": [%s]}' % json.dumps(ROLLOUT).encode(), ["rollouts"], "twice"),
        (rb'{"rollout\u0073": []}', [], "must begin"),
        (b'{"rollouts": [], "more": 1}', ["more"], "not permitted"),
        (b'{"rollouts": {}}', ["rollouts"], "valid array"),
        (b'{"rollouts": [{}', [], "EOF"),
        (b'{"rollouts": []}]', [], "trailing"),
        (b'{"rollouts": ["%s]}' % (b'\\"' * 9), [], "EOF"),
        (b'{"rollouts": [%s]}' % (b"[" * 200_000), [], "recursion"),
        (b'{"rollouts": [{"prompt_ids": %s]}' % (b"[" * 200_000), [], "recursion"),
        (b"[]", [], "object"),
        (b"", [], ""),
    ],
)
def test_what_is_wrong_is_named(content, loc, message):
    (response,) = call(("/support", content))
    assert response.status_code == 422
    (error,) = [e for e in response.json()["detail"] if message in e["msg"]][:1]
    assert error["loc"] == ["body", *loc]


def test_a_body_with_thousands_of_errors_gets_a_short_answer():
    bad = {**ROLLOUT, "prompt_ids": [-1] * 500}
    (response,) = call(("/support", json.dumps({"rollouts": [bad] * 1000}).encode()))
    assert response.status_code == 422
    assert len(response.json()["detail"]) == MAX_ERRORS
    assert [error["loc"][:4] for error in response.json()["detail"]] == [
        ["body", "rollouts", index, "prompt_ids"] for index in range(MAX_ERRORS)
    ]


def test_items_and_tokens_of_a_request_are_limited():
    for model, content in BODIES.items():
        (field,) = content
        bodies = [(PATHS[model], json.dumps({field: content[field][:1] * size}).encode()) for size in (3, 4)]
        fits, over = call(*bodies, max_items=3)
        assert fits.status_code == 200
        assert over.status_code == 422
        assert over.json()["detail"] == [
            {"loc": ["body", field], "msg": "more than 3 items (--max-items)", "type": "too_long"}
        ]
    # Nine tokens with the reference, or three.
    many = {**ROLLOUT, "prompt_ids": list(range(20_000))}
    for path, content, tokens in (
        ("/support", {"rollouts": [ROLLOUT]}, 7),
        ("/score", {"items": [ITEM]}, 3),
        ("/support", {"rollouts": [many]}, 20_005),
    ):
        body = json.dumps(content).encode()
        (over,) = call((path, body), max_item_tokens=min(tokens - 1, 6))
        assert over.status_code == 413
        assert re.search(rf"{next(iter(content))}\[0\] has .* tokens.*\(--max-item-tokens\)", over.json()["detail"])
        (fits,) = call((path, body), max_item_tokens=tokens)
        assert "--max-item-tokens" not in fits.text
    # Texts have commas, and their own limit.
    text = "," * 10_000
    group = {**GROUP, "answers": [text]}
    assert call(("/cluster", json.dumps({"groups": [group]}).encode()), max_item_tokens=5)[0].status_code == 200
    with pytest.raises(SequenceTooLong, match=r"rollouts\[0\]"):
        parse_body(json.dumps({"rollouts": [many]}).encode(), SupportBody, 9, 10)


def test_a_large_body_is_parsed_in_small_pieces(monkeypatch):
    """No single call of the parser, which lets no other thread run, gets more than one element."""
    sizes = []
    for model in (SupportBody, SupportBody.model_fields["rollouts"].annotation.__args__[0]):
        parse = model.model_validate_json
        monkeypatch.setattr(
            model, "model_validate_json", lambda data, parse=parse: sizes.append(len(data)) or parse(data)
        )
    body = json.dumps({"rollouts": [{**ROLLOUT, "prompt_ids": list(range(1000))}] * 50}).encode()
    assert len(parse_body(body, SupportBody, 100, 2000).rollouts) == 50
    assert len(sizes) == 51 and max(sizes) < len(body) / 49


@pytest.mark.parametrize(("module", "held"), [(json_body, "parse_body"), (scorer_app, "check_rollouts")])
def test_health_is_answered_while_a_body_is_parsed_and_checked(monkeypatch, module, held):
    entered, go_on = threading.Event(), threading.Event()
    original = getattr(module, held)

    def wait(*args, **options):
        entered.set()
        assert go_on.wait(30), "the event loop was waiting for this"
        return original(*args, **options)

    monkeypatch.setattr(module, held, wait)

    async def run():
        transport = httpx.ASGITransport(create_app(Pool())[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://scorer") as http:
            asked = asyncio.create_task(http.post("/support", json=BODIES[SupportBody]))
            while not entered.is_set():
                await asyncio.sleep(0.01)
            health = await http.get("/health")
            assert not asked.done()
            go_on.set()
            return health, await asked

    health, answer = asyncio.run(run())
    assert health.status_code == answer.status_code == 200
    assert answer.json()["support"] == [[[0.0], [0.0]], [[0.0], [0.0]]]


def test_only_json_is_read_as_json():
    app = create_app(Pool())[0]

    async def run():
        transport = httpx.ASGITransport(app)
        body = json.dumps(BODIES[SupportBody]).encode()
        async with httpx.AsyncClient(transport=transport, base_url="http://scorer") as http:
            kinds = ["application/json; charset=utf-8", "Application/JSON", "application/a+json", "text/plain", ""]
            return [(await http.post("/support", content=body, headers={"Content-Type": k})).status_code for k in kinds]

    assert asyncio.run(run()) == [200, 200, 200, 422, 422]


def test_while_loading_requests_are_told_to_come_back():
    pool = Pool()
    pool.info, pool.is_complete = None, False
    app, _ = create_app(pool)
    for path, body in [(PATHS[model], json.dumps(body).encode()) for model, body in BODIES.items()]:
        (response,) = call((path, body), app=app)
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert "still loading" in response.json()["detail"]

    async def none_up(*_):
        raise NoWorker("none is up")

    pool = Pool()
    pool.cluster = none_up
    (response,) = call(("/cluster", json.dumps(BODIES[ClusterBody]).encode()), app=create_app(pool)[0])
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


def test_degraded_while_a_worker_of_either_kind_is_missing():
    async def health(pool):
        transport = httpx.ASGITransport(create_app(pool)[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://scorer") as http:
            response = await http.get("/health")
            return response.status_code, response.json()

    pool = Pool()
    assert asyncio.run(health(pool))[0] == 200
    pool.is_complete = False
    assert asyncio.run(health(pool)) == (503, {"status": "degraded", "num_workers": 1})
    pool.info = None
    assert asyncio.run(health(pool)) == (503, {"status": "loading", "num_workers": 1})


def test_pairs_are_counted_in_the_metrics():
    app, metrics = create_app(Pool())
    body = json.dumps(BODIES[ClusterBody]).encode()
    call(("/cluster", body), ("/cluster", body), app=app)
    values = {
        name: metrics.registry.get_sample_value(f"siop_scorer_nli_{name}_pairs_total") for name in ("asked", "computed")
    }
    assert values == {"asked": 14, "computed": 10}


def test_openapi_describes_bodies_answers_and_refusals():
    api = create_app(Pool())[0].openapi()
    for model, path in PATHS.items():
        operation = api["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{model.__name__}"}
        assert set(operation["responses"]) == {"200", "400", "401", "408", "413", "415", "422", "503"}
        for status in ("413", "422", "503"):
            answer = operation["responses"][status]["content"]["application/json"]["schema"]
            assert answer == {"$ref": "#/components/schemas/ErrorAnswer"}
    token_ids = api["components"]["schemas"]["SupportReference"]["properties"]["token_ids"]
    assert token_ids["minItems"] == 1
    assert token_ids["items"] == {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}
    assert {"errors", "support"} < set(api["components"]["schemas"]["SupportAnswer"]["properties"])


def test_limits_and_their_defaults_are_in_the_help():
    text = " ".join(parser().format_help().split())
    for option, default in [
        ("--max-body-mb", "64"),
        ("--max-items", "65536"),
        ("--max-item-tokens", "262144"),
        ("--max-concurrency", "64"),
        ("--max-model-len", "the model's limit"),
    ]:
        assert re.search(rf"{option} [^()]*\(default: {default}\)", text), option
    assert "A text may have 200000 characters" in text
