"""The scoring service as real processes over real HTTP: endpoints, bad input, limits, faults, launcher."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from method_helpers import byte_tokenizer, rollout
from scorer_process import ScorerProcess, eventually, free_port, launcher
from scoring_cases import query_of
from tiny_models import MAX_MODEL_LEN, VOCAB_SIZE, save_causal_lm, save_classifier
from verl.trainer.siop.trainer import SiopTrainer
from verl.utils.siop import scoring_client, scoring_server
from verl.utils.siop.errors import ScorerError, ScorerUnavailable, SiopConfigError
from verl.utils.siop.http.packed import MEDIA_TYPE, PackedIds, offers_packed, pack, pack_ids
from verl.utils.siop.scorer.app import create_app
from verl.utils.siop.scorer.engines.base import Probe, RolloutQuery
from verl.utils.siop.scorer.engines.nli import AnswerGroup
from verl.utils.siop.scorer.engines.nli_model import TransformersNli
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine
from verl.utils.siop.scorer.pool import WorkerPool, _Worker, partition
from verl.utils.siop.scorer.settings import parser, worker_settings
from verl.utils.siop.scorer.workers import ScoringWorker, WorkerInfo, WorkerSettings
from verl.utils.siop.scoring_client import ScoringClient
from verl.utils.siop.scoring_server import main
from verl.utils.siop.siop_process_reward import Reference, SiopConfig, SupportRequest

TOKEN = "secret"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
MAX_CONCURRENCY = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return save_causal_lm(root / "lm"), save_classifier(root / "nli")


@pytest.fixture(scope="module")
def scorer(models, tmp_path_factory):
    process = ScorerProcess(
        f"--model {models[0]} --nli-model {models[1]} --max-body-mb 1 --max-concurrency {MAX_CONCURRENCY} "
        "--max-items 500 --max-item-tokens 200".split(),
        tmp_path_factory.mktemp("scorer") / "scorer.log",
        env={"SIOP_API_TOKEN": TOKEN},
    )
    try:
        health = process.wait_healthy()
        assert (health["status"], health["num_workers"]) == ("healthy", 1)
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def engine(models):
    return TransformersEngine.from_pretrained(str(models[0]))


def request(seed: int = 0, size: int = 4) -> list[SupportRequest]:
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, VOCAB_SIZE, n).tolist()  # noqa: E731
    prompt, references = draw(10), [Reference("r", draw(6), 2, 5), Reference("s", draw(3), 0, 3)]
    return [SupportRequest(prompt, draw(40), [0, 12, 40], references) for _ in range(size)]


def body(rollouts: list[SupportRequest]) -> dict:
    return {
        "rollouts": [
            {
                "prompt_ids": rollout.prompt_ids,
                "response_ids": rollout.response_ids,
                "boundaries": rollout.boundaries,
                "references": [{"token_ids": r.token_ids, "start": r.start, "end": r.end} for r in rollout.references],
            }
            for rollout in rollouts
        ]
    }


def queries(rollouts):
    return [query_of(rollout) for rollout in rollouts]


def local(engine, rollouts):
    return engine.support(queries(rollouts))


def client(scorer, **options) -> ScoringClient:
    return ScoringClient(scorer.url, **{"token": TOKEN, "timeout_s": 60, "backoff_s": 0.05, **options})


def post(scorer, path, json=None, **options):
    return httpx.post(f"{scorer.url}{path}", json=json, **{"headers": HEADERS, "timeout": 60, **options})


def test_support(scorer, engine):
    rollouts = request()
    answer = post(scorer, "/support", body(rollouts)).json()
    expected = local(engine, rollouts)
    np.testing.assert_allclose(answer["support"], expected.support, atol=1e-4)
    assert (
        answer["computed_tokens"] == expected.computed_tokens < expected.requested_tokens == answer["requested_tokens"]
    )
    assert answer["elapsed_ms"] > 0


def test_a_packed_body_is_answered_as_the_json_one(scorer):
    form = {"rollouts": [scoring_client._rollout_body(item, pack_ids) for item in request()]}
    headers = {**HEADERS, "Content-Type": MEDIA_TYPE}
    answer = post(scorer, "/support", content=pack(form), headers=headers)
    assert answer.json()["support"] == post(scorer, "/support", body(request())).json()["support"]
    assert offers_packed(answer.headers)
    form["rollouts"][1]["response_ids"] = PackedIds(2, b"odd")
    refused = post(scorer, "/support", content=pack(form), headers=headers)
    assert refused.status_code == 422
    assert [error["loc"] for error in refused.json()["detail"]] == [["body", "rollouts", 1, "response_ids"]]


def test_the_client_packs_once_it_is_offered(scorer, engine, monkeypatch):
    kinds = []
    attempt = ScoringClient._attempt

    def noted(self, http, path, content, headers, *more):
        kinds.append(headers["Content-Type"])
        return attempt(self, http, path, content, headers, *more)

    monkeypatch.setattr(ScoringClient, "_attempt", noted)

    async def ask():
        async with client(scorer) as scoring:
            return [await scoring.support(request()) for _ in range(2)]

    for support in asyncio.run(ask()):
        np.testing.assert_allclose(support, local(engine, request()).support, atol=1e-4)
    assert kinds == ["application/json", MEDIA_TYPE]


def test_score_takes_the_first_release_payload(scorer, engine):
    rollout = request(size=1)[0]
    items = [
        {
            "prompt_ids": rollout.prompt_ids + rollout.response_ids[:boundary],
            "response_ids": reference.token_ids,
            "ref_start": reference.start,
            "ref_end": reference.end,
        }
        for boundary in rollout.boundaries
        for reference in rollout.references
    ]
    answer = post(scorer, "/score", {"items": items}).json()
    assert set(answer) == {"scores", "elapsed_ms"}
    np.testing.assert_allclose(answer["scores"], np.ravel(local(engine, [rollout]).support[0]), atol=1e-4)


def test_cluster_and_nli_score_take_the_first_release_payload(scorer, models):
    nli = TransformersNli.from_pretrained(str(models[1]))
    answers = ["Paris", "Rome", "paris.", "Oslo"]
    groups = [{"group_id": "u7", "question": "where?", "answers": answers, "strict": True}]
    groups.append({"group_id": "u8", "question": "where?", "answers": []})
    answer = post(scorer, "/cluster", {"groups": groups}).json()
    first, second = answer["results"]
    ids = nli.cluster([AnswerGroup("where?", answers)])[0]
    assert (first["group_id"], first["semantic_ids"]) == ("u7", ids)
    members = [index for index, cluster in enumerate(ids) if cluster == 0]
    assert first["cluster_info"]["0"] == {
        "count": len(members),
        "frequency": len(members) / 4,
        "reference": "Paris",
        "members": members,
    }
    assert second == {"group_id": "u8", "semantic_ids": [], "cluster_info": {}}

    pairs = [("Paris is in France", "Paris"), ("no", "Rome")]
    answer = post(scorer, "/nli_score", {"pairs": [{"premise": p, "hypothesis": h} for p, h in pairs]}).json()
    assert answer["scores"] == pytest.approx(nli.entailment(pairs), abs=1e-5)


def test_client_gives_the_same_values_from_several_event_loops(scorer, engine, models):
    nli = TransformersNli.from_pretrained(str(models[1]))
    scorer_client = client(scorer)
    rollouts = request(3)

    async def use():
        await scorer_client.wait_ready(5)
        return await asyncio.gather(
            scorer_client.support(rollouts),
            scorer_client.cluster("q", ["a", "b", "A"]),
            scorer_client.entailment([("p", "h")]),
            scorer_client.support([]),
        )

    async def use_and_close():
        async with scorer_client:
            return await use()

    for run in (use_and_close, use_and_close, use, use_and_close):
        support, ids, entailment, empty = asyncio.run(run())
        np.testing.assert_allclose(support, local(engine, rollouts).support, atol=1e-4)
        assert ids == nli.cluster([AnswerGroup("q", ["a", "b", "A"])])[0]
        assert entailment == pytest.approx(nli.entailment([("p", "h")]), abs=1e-5)
        assert empty == []
    one = local(engine, rollouts)
    assert scorer_client.computed_tokens == 4 * one.computed_tokens
    assert scorer_client.requested_tokens == 4 * one.requested_tokens
    assert scorer_client.nli.endswith(str(models[1]))


def change(field: str, value) -> dict:
    data = body(request(size=2))
    target = data["rollouts"][1]
    *path, last = field.split(".")
    for part in path:
        target = target[int(part) if part.isdigit() else part]
    target[last] = value
    return data


BAD = [
    ("/support", {}, ["rollouts"]),
    ("/support", {"rollouts": [], "extra": 1}, ["extra"]),
    ("/support", change("boundaries", [0, 41]), ["rollouts", 1, "boundaries"]),
    ("/support", change("boundaries", []), ["rollouts", 1, "boundaries"]),
    ("/support", change("prompt_ids", [1, "2"]), ["rollouts", 1, "prompt_ids", 1]),
    ("/support", change("prompt_ids", [1, -2]), ["rollouts", 1, "prompt_ids", 1]),
    ("/support", change("references", []), ["rollouts", 1, "references"]),
    ("/support", change("references.0.end", 7), ["rollouts", 1, "references", 0, "end"]),
    ("/support", change("references.0.start", 5), ["rollouts", 1, "references", 0, "end"]),
    ("/score", {"items": [{"prompt_ids": [1], "response_ids": [2], "ref_start": 0}]}, ["items", 0, "ref_end"]),
    ("/cluster", {"groups": [{"group_id": "a", "question": 3, "answers": []}]}, ["groups", 0, "question"]),
    ("/nli_score", {"pairs": [["a", "b"]]}, ["pairs", 0]),
]


@pytest.mark.parametrize(("path", "data", "field"), BAD)
def test_bad_input_names_the_field(scorer, path, data, field):
    response = post(scorer, path, data)
    assert response.status_code == 422
    assert ["body", *field] in [error["loc"] for error in response.json()["detail"]]
    assert len(response.content) < 2000


def test_bad_input_that_only_the_model_can_tell(scorer):
    response = post(scorer, "/support", change("prompt_ids", [VOCAB_SIZE]))
    assert response.status_code == 422
    assert f"rollouts[1].prompt_ids[0] = {VOCAB_SIZE}" in response.json()["detail"]
    item = {"prompt_ids": [], "response_ids": [2], "ref_start": 0, "ref_end": 1}
    response = post(scorer, "/score", {"items": [item]})
    assert response.status_code == 422
    assert "items[0].ref_start" in response.json()["detail"]
    assert post(scorer, "/support", content=b"{not json").status_code == 422
    assert post(scorer, "/support", content=b"\xff\xfe").status_code in (400, 422)


def too_long(index: int = 1, size: int = 2, fits: bool = False) -> list[SupportRequest]:
    """A request whose rollout ``index`` takes one token more than the model does, or just fits."""
    rollouts = request(size=size)
    rollout = rollouts[index]
    end = max(reference.end for reference in rollout.references)
    size = MAX_MODEL_LEN - len(rollout.prompt_ids) - end + (not fits)
    rollouts[index] = replace(rollout, response_ids=[1] * size, boundaries=[0, size])
    return rollouts


def test_a_rollout_that_is_too_long_is_its_own_error(scorer, engine):
    answer = post(scorer, "/support", body(too_long(size=3))).json()
    rest = [rollout for index, rollout in enumerate(too_long(size=3)) if index != 1]
    assert set(answer) == {"support", "errors", "computed_tokens", "requested_tokens", "elapsed_ms"}
    assert answer["support"][1] is None
    np.testing.assert_allclose([answer["support"][0], answer["support"][2]], local(engine, rest).support, atol=1e-4)
    (error,) = answer["errors"]
    assert error["rollout"] == 1
    assert re.match(rf"too long: {MAX_MODEL_LEN + 1} tokens.*max_model_len is {MAX_MODEL_LEN}", error["detail"])

    answer = post(scorer, "/support", body(too_long(fits=True))).json()
    assert set(answer) == {"support", "computed_tokens", "requested_tokens", "elapsed_ms"}
    np.testing.assert_allclose(answer["support"][1], local(engine, too_long(fits=True)).support[1], atol=1e-4)


def test_the_client_raises_for_a_rollout_that_is_too_long_and_names_it(scorer, monkeypatch):
    async def ask(rollouts):
        async with client(scorer) as scorer_client:
            return await scorer_client.support(rollouts)

    message = rf"rollouts\[1\] is too long: {MAX_MODEL_LEN + 1} tokens.*max_model_len is {MAX_MODEL_LEN}"
    with pytest.raises(ScorerError, match=message):
        asyncio.run(ask(too_long()))
    with pytest.raises(ScorerError, match=f"413.*{message.replace('1', '0', 1)}"):
        asyncio.run(ask(too_long(0, size=1)))
    # Of several requests: counted in the whole call.
    monkeypatch.setattr(scoring_client, "REQUEST_TOKENS", 100)
    other = [SupportRequest([seed], [2, 3], [0], r.references) for seed, r in enumerate(request(size=60))]
    with pytest.raises(ScorerError, match=message.replace("1", "61", 1)):
        asyncio.run(ask(other + too_long()))


def test_a_wrong_token_is_noticed_before_there_is_work(scorer):
    asyncio.run(client(scorer).check_token())
    for token in ("", "wrong"):
        with pytest.raises(ScorerError, match=rf"{scorer.url} answers HTTP 401, .*set SIOP_API_TOKEN"):
            asyncio.run(client(scorer, token=token).check_token())
    with pytest.raises(ScorerUnavailable, match="/metrics"):
        asyncio.run(ScoringClient("http://127.0.0.1:9").check_token())


def test_drop_group_drops_the_question_with_the_long_rollout_alone(scorer, monkeypatch):
    monkeypatch.setenv("SIOP_API_TOKEN", TOKEN)
    trainer = object.__new__(SiopTrainer)
    trainer.tokenizer = byte_tokenizer()
    keys = {"siop_reference_prefix": "", "siop_reference_suffix": "", "siop_eta": 0.0, "siop_scorer_url": scorer.url}
    turns = ["look<|im_end|>", "<answer>x</answer><|im_end|>"]
    rollouts = [rollout(uid, turns, ["y" * size]) for uid, size in [("a", 9), ("b", 9), ("b", 150), ("c", 7)]]
    # In a request of all questions, and of its own.
    for streaming, index in ((False, 2), (True, 1)):
        trainer.siop = SiopConfig(**keys, siop_streaming=streaming)
        with pytest.raises(ScorerError, match=rf"rollouts\[{index}\] is too long"):
            trainer._scores(rollouts)
        trainer.siop = SiopConfig(**keys, siop_streaming=streaming, siop_on_scorer_error="drop_group")
        scores = trainer._scores(rollouts)
        assert (scores.rows, scores.dropped) == ([0, 3], {"b"})
        assert all(len(support) == 3 for support in scores.rewards.support)


def test_the_pool_names_the_rollouts_of_all_parts(engine):
    """Two workers get parts of a request; errors and scores go back to the places of the request."""
    pool = WorkerPool(WorkerSettings(model="unused"), num_workers=2)
    pool._workers = [_Worker(None, index, up=True) for index in range(2)]
    sizes = []

    async def call(method, payload, cost):
        sizes.append(len(payload))
        return getattr(engine, method)(payload)

    pool._call = call
    rollouts = too_long(0, 3)
    rollouts += [SupportRequest(r.prompt_ids[::-1], r.response_ids, r.boundaries, r.references) for r in too_long(2, 3)]
    result = asyncio.run(pool.support(queries(rollouts)))
    assert len(sizes) == 2
    assert list(result.errors) == [0, 5] and result.support[0] == result.support[5] == []
    for index in (1, 2, 3, 4):
        np.testing.assert_allclose(result.support[index], local(engine, [rollouts[index]]).support[0], atol=1e-4)


def test_too_long_is_413_and_names_what_it_is(scorer):
    response = post(scorer, "/support", body([too_long()[1]] * 7))
    assert response.status_code == 413
    assert "rollouts[0] is too long" in response.json()["detail"] and "and 2 more" in response.json()["detail"]
    items = [{"prompt_ids": [1], "response_ids": [2] * size, "ref_start": 0, "ref_end": size} for size in (127, 128)]
    response = post(scorer, "/score", {"items": items})
    assert response.status_code == 413
    assert "items[1] is too long: 129 tokens" in response.json()["detail"]
    response = post(
        scorer, "/cluster", {"groups": [{"group_id": "a", "question": "q", "answers": ["x" * 90, "y" * 90]}]}
    )
    assert response.status_code == 413
    assert "xxx" in response.json()["detail"]
    items = [{"prompt_ids": [1] * 200, "response_ids": [2], "ref_start": 0, "ref_end": 1}]
    assert "--max-item-tokens" in post(scorer, "/score", {"items": items}).json()["detail"]
    pairs = [{"premise": "p", "hypothesis": "h"}] * 501
    assert "--max-items" in post(scorer, "/nli_score", {"pairs": pairs}).json()["detail"][0]["msg"]
    assert post(scorer, "/support", content=b" " * (2**20 + 1)).status_code == 413

    def stream():
        for _ in range(20):
            yield b" " * 2**16

    assert post(scorer, "/support", content=stream()).status_code == 413


def test_client_raises_what_the_server_says(scorer):
    async def ask(rollouts, **options):
        async with client(scorer, **options) as scorer_client:
            return await scorer_client.support(rollouts)

    rollouts = request(size=2)
    rollouts[1].boundaries[1] = 41
    with pytest.raises(ScorerError, match=r"422.*rollouts.1.boundaries.*41"):
        asyncio.run(ask(rollouts))
    with pytest.raises(ScorerError, match="401"):
        asyncio.run(ask(request(), token="wrong"))


def test_token_is_asked_everywhere_but_on_health(scorer):
    for path in ("/metrics", "/docs", "/openapi.json"):
        assert httpx.get(f"{scorer.url}{path}").status_code == 401
        assert httpx.get(f"{scorer.url}{path}", headers=HEADERS).status_code == 200
    assert post(scorer, "/support", {"rollouts": []}, headers={}).status_code == 401
    subprocess.run(["curl", "-fsS", "--noproxy", "*", f"{scorer.url}/health"], check=True, capture_output=True)


def test_request_ids_and_metrics(scorer):
    before = httpx.get(f"{scorer.url}/metrics", headers=HEADERS).text
    response = post(scorer, "/support", body(request(5)), headers={**HEADERS, "X-Request-Id": "step-12"})
    assert response.headers["x-request-id"] == "step-12"
    # The line is written after the answer.
    eventually(lambda: re.search(r"POST '/support' 200 .* id=step-12", scorer.log.read_text()), 30)
    after = httpx.get(f"{scorer.url}/metrics", headers=HEADERS).text

    def value(text, name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])

    name = "siop_scorer_computed_tokens_total"
    assert value(after, name) - value(before, name) == response.json()["computed_tokens"]
    assert value(after, "siop_scorer_workers_up") == value(after, "siop_scorer_nli_workers_up") == 1


def test_overload_is_503_and_the_client_gets_every_answer_anyway(scorer, engine):
    requests = [request(seed, size=12) for seed in range(20)]
    expected = [local(engine, rollouts).support for rollouts in requests]

    async def burst():
        async with httpx.AsyncClient(timeout=60, headers=HEADERS) as http:
            return await asyncio.gather(*(http.post(f"{scorer.url}/support", json=body(r)) for r in requests))

    responses = asyncio.run(burst())
    refused = [response for response in responses if response.status_code == 503]
    assert refused and all(response.headers["retry-after"] == "1" for response in refused)
    for response, support in zip(responses, expected, strict=True):
        if response.status_code != 503:
            np.testing.assert_allclose(response.json()["support"], support, atol=1e-4)

    async def patient():
        async with client(scorer, max_concurrency=MAX_CONCURRENCY + 2) as scorer_client:
            return await asyncio.gather(*(scorer_client.support(rollouts) for rollouts in requests))

    for support, right in zip(asyncio.run(patient()), expected, strict=True):
        np.testing.assert_allclose(support, right, atol=1e-4)


@pytest.mark.parametrize(
    "answer",
    [
        b"not json",
        b"[]",
        b'{"support": []}',
        b'{"support": [[[0.0, 0.0]]]}',
        b'{"support": [[[0.0, NaN], [0.0, 0.0], [0.0, 0.0]]]}',
        b'{"support": [[[0.0, null], [0.0, 0.0], [0.0, 0.0]]]}',
    ],
)
def test_garbled_answers_are_never_values(answer):
    """Against a server that answers every request with 200 and ``answer``; it counts them."""
    import http.server

    counted = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            counted.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:

        async def ask():
            async with ScoringClient(
                f"http://127.0.0.1:{server.server_port}", attempts=2, backoff_s=0.01, timeout_s=5
            ) as scorer_client:
                return await scorer_client.support(request(size=1))

        with pytest.raises(ScorerError, match="not valid"):
            asyncio.run(ask())
        assert len(counted) == 2
    finally:
        server.shutdown()
        server.server_close()


def test_no_scorer_is_unavailable_with_address_attempts_and_reason():
    url = f"http://127.0.0.1:{free_port()}"

    async def ask(wait):
        async with ScoringClient(url, attempts=3, backoff_s=0.01, timeout_s=5) as scorer_client:
            await (scorer_client.wait_ready(0.6) if wait else scorer_client.entailment([("a", "b")]))

    with pytest.raises(ScorerUnavailable, match=rf"{url}/nli_score after 3 attempt.*ConnectError") as caught:
        asyncio.run(ask(False))
    assert caught.value.attempts == 3
    with pytest.raises(ScorerUnavailable, match=url):
        asyncio.run(ask(True))


def test_partition_keeps_prompts_together_and_balances_tokens():
    rng = np.random.default_rng(0)
    empty = np.zeros(0, dtype=np.int64)
    prompts = [rng.integers(0, 9, 20) for _ in range(6)]
    rollouts = [RolloutQuery(prompts[i % 6], rng.integers(0, 9, 50), [0], [Probe(empty, 0, 0)]) for i in range(24)]
    parts = partition(rollouts, 3)
    assert sorted(index for part in parts for index in part) == list(range(24))
    assert [len(part) for part in parts] == [8, 8, 8]
    for prompt in range(6):
        assert sum(any(index % 6 == prompt for index in part) for part in parts) == 1
    assert partition(rollouts[:1], 3) == [[0]]
    assert partition([], 3) == [[]]


@contextlib.contextmanager
def asked_of_a_stopped_worker(scorer, pid, path, data):
    """A request that is in flight for as long as the worker is stopped; yields the list that will hold its answer."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(scorer, path, data, timeout=180)))
    os.kill(pid, signal.SIGSTOP)
    thread.start()
    try:
        while "siop_scorer_in_flight 1.0" not in httpx.get(f"{scorer.url}/metrics", headers=HEADERS, timeout=60).text:
            time.sleep(0.05)
        yield answers
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        thread.join(180)


@pytest.mark.parametrize("kind", ["Scoring", "Nli"])
def test_a_killed_worker_is_restarted_and_its_request_answered(scorer, engine, models, kind):
    (first,) = scorer.worker_pids(kind)
    rollouts, answers = request(9), ["Ada", "Grace", "Edith"]
    groups = [{"group_id": "g", "question": "who?", "answers": answers}]
    path, data = ("/support", body(rollouts)) if kind == "Scoring" else ("/cluster", {"groups": groups})
    with asked_of_a_stopped_worker(scorer, first, path, data) as received:
        os.kill(first, signal.SIGKILL)
        health = None
        while health is None or health.status_code == 200:
            health = httpx.get(f"{scorer.url}/health", timeout=60)
        assert (health.status_code, health.json()) == (
            503,
            {"status": "degraded", "num_workers": int(kind == "Nli")},
        )
    (response,) = received
    assert response.status_code == 200
    if kind == "Scoring":
        np.testing.assert_allclose(response.json()["support"], local(engine, rollouts).support, atol=1e-4)
    else:
        ids = TransformersNli.from_pretrained(str(models[1])).cluster([AnswerGroup("who?", answers)])
        assert [result["semantic_ids"] for result in response.json()["results"]] == ids
    scorer.wait_healthy()
    (second,) = scorer.worker_pids(kind)
    assert second != first


def test_sigterm_finishes_what_is_in_flight_and_ends_everything(scorer, engine):
    rollouts = request(10)
    (pid,) = scorer.worker_pids()
    with asked_of_a_stopped_worker(scorer, pid, "/support", body(rollouts)) as received:
        scorer.process.terminate()
        while "requests in flight have 30 s to finish" not in scorer.log.read_text():
            time.sleep(0.05)
        with pytest.raises(httpx.ConnectError):
            while True:  # until it no longer listens
                httpx.get(f"{scorer.url}/health", timeout=60)
        assert not received and scorer.process.poll() is None
    (response,) = received
    assert response.status_code == 200
    np.testing.assert_allclose(response.json()["support"], local(engine, rollouts).support, atol=1e-4)
    assert scorer.stop() == 0


def test_launcher_starts_reports_and_stops(models, tmp_path, capsys, logging_as_before):
    port = free_port()
    started = launcher(tmp_path, port, "start", "--", "--threads", "1", SIOP_MODEL=str(models[0]))
    try:
        assert started.returncode == 0, started.stderr + started.stdout
        assert str(tmp_path / "siop_scorer.log") in started.stdout and "launch_siop_scorer.sh stop" in started.stdout
        assert "NLI backend: lexical" in (tmp_path / "siop_scorer.log").read_text()
        pid = int((tmp_path / "siop_scorer.pid").read_text())
        status = launcher(tmp_path, port, "status")
        assert (status.returncode, str(pid) in status.stdout) == (0, True)
        again = launcher(tmp_path, port, "start", SIOP_MODEL=str(models[0]))
        assert again.returncode != 0 and "already running" in again.stderr
        (tmp_path / "other").mkdir()
        busy = launcher(tmp_path / "other", port, SIOP_MODEL=str(models[0]))
        assert busy.returncode != 0 and f"port {port} is in use" in busy.stderr
        assert main(["--model", str(models[0]), "--port", str(port)]) == 1
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    finally:
        stopped = launcher(tmp_path, port, "stop")
    assert (stopped.returncode, "is stopped" in stopped.stdout) == (0, True)
    assert not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    assert launcher(tmp_path, port, "status").returncode == 1
    assert "ready" in (tmp_path / "siop_scorer.log").read_text()


@pytest.fixture
def logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_what_keeps_it_from_starting_is_one_clear_line(models, tmp_path, capsys, logging_as_before):
    save_classifier(tmp_path / "no_nli", labels=("LABEL_0", "LABEL_1"), self_test=False)
    capsys.readouterr()  # transformers shows the progress of saving
    lm = str(models[0])
    for arguments, message in [
        (["--model", str(tmp_path / "nowhere")], f"the model directory {tmp_path / 'nowhere'} does not exist"),
        (["--model", str(tmp_path)], "config.json is missing"),
        (["--model", lm, "--nli-model", str(tmp_path / "no_nli")], "no_nli.*LABEL_0"),
        (["--model", lm, "--nli-model", "./nowhere"], "--nli-model: the model directory ./nowhere does not exist"),
        (["--model", lm, "--nli-backend", "transformers"], "needs --nli-model"),
        (["--model", "none", "--engine", "transformers"], "--engine transformers needs a language model"),
        (["--model", lm, "--num-gpus", "99"], "--num-gpus is 99"),
        (["--model", lm, "--max-concurrency", "0"], "--max-concurrency must be more than 0"),
        (["--model", lm, "--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
    ]:
        assert main([*arguments, "--port", "0"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(f"the scorer cannot start: .*{message}", line)


def test_an_open_address_without_a_token_is_warned_of(monkeypatch, capsys, logging_as_before):
    def no_pool(*_):
        raise SiopConfigError("no more than the start is looked at")

    monkeypatch.setattr(scoring_server, "WorkerPool", no_pool)
    monkeypatch.delenv("SIOP_API_TOKEN", raising=False)
    for host, token, warned in (("0.0.0.0", "", 1), ("0.0.0.0", "t", 0), ("127.0.0.1", "", 0)):
        monkeypatch.setenv("SIOP_API_TOKEN", token)
        assert main(["--model", "none", "--num-gpus", "0", "--host", host, "--port", "0"]) == 1
        said = capsys.readouterr().err
        assert said.count(f"whoever reaches {host} can use the scorer: set SIOP_API_TOKEN") == warned, said
        assert "no more than the start" in said


def test_without_a_language_model_only_clusters_and_entailment_are_answered():
    settings, workers, _ = worker_settings(parser().parse_args(["--model", "none", "--num-gpus", "0"]))
    assert (settings.model, settings.engine, workers) == ("none", "none", 1)
    pool = WorkerPool(settings, num_workers=1)
    pool.info = WorkerInfo(ScoringWorker(settings).load(), "lexical")
    pool._workers = [_Worker(None, 0, up=True)]

    async def ask():
        transport = httpx.ASGITransport(create_app(pool)[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://scorer") as http:
            health = await http.get("/health")
            refused = [await http.post("/support", json=body(request())), await http.post("/support", json=body([]))]
            item = {"prompt_ids": [1], "response_ids": [2], "ref_start": 0, "ref_end": 1}
            refused.append(await http.post("/score", json={"items": [item]}))
            pair = {"premise": "in Paris", "hypothesis": "Paris"}
            return health.json(), refused, await http.post("/nli_score", json={"pairs": [pair]})

    health, refused, entailment = asyncio.run(ask())
    assert (health["engine"], health["model"], health["nli"]) == ("none", "none", "lexical")
    for response in refused:
        assert response.status_code == 422 and "this scorer has no language model" in response.json()["detail"]
    assert (entailment.json()["scores"], entailment.json()["nli"]) == ([1.0], "lexical")


def test_a_model_that_cannot_be_packed_ends_the_service_by_name(tmp_path):
    """Also: what fails in a worker ends the service, and the launcher shows why."""
    model = save_causal_lm(tmp_path / "sliding", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    failed = launcher(tmp_path, free_port(), SIOP_MODEL=str(model))
    assert failed.returncode == 1
    errors = [line for line in failed.stderr.splitlines() if "the scorer cannot start" in line]
    assert len(errors) == 1 and "sliding_attention" in errors[0] and "qwen3" in errors[0]
    assert not (tmp_path / "siop_scorer.pid").exists()
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout.splitlines()
    assert not any(str(model).encode() in command for command in commands)
    assert "set SIOP_MODEL" in launcher(tmp_path, free_port()).stderr
