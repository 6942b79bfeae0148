"""MessagePack bodies: what the JSON ones are, in a third of the bytes; bounded, and refused by place."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import msgpack
import numpy as np
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from verl.utils.siop.errors import SequenceTooLong
from verl.utils.siop.http.json_body import parse_body, parse_packed
from verl.utils.siop.http.packed import PackedIds, is_packed, offers_packed, pack, pack_ids, unpack_ids
from verl.utils.siop.scorer.wire import SupportBody

ids = st.lists(st.integers(0, 2**31 - 1), max_size=20)


@st.composite
def rollouts(draw: st.DrawFn) -> dict[str, Any]:
    response = draw(ids)
    boundaries = draw(st.lists(st.integers(0, len(response)), min_size=1, max_size=4))
    openings = draw(st.sampled_from([0, len(boundaries)]))
    references = []
    for token_ids in draw(st.lists(ids.filter(bool), min_size=1, max_size=3)):
        start = draw(st.integers(0, len(token_ids) - 1))
        references.append({"token_ids": token_ids, "start": start, "end": draw(st.integers(start + 1, len(token_ids)))})
    return {
        "prompt_ids": draw(ids),
        "response_ids": response,
        "boundaries": boundaries,
        "openings": [draw(ids) for _ in range(openings)],
        "references": references,
    }


def packed(value: Any, key: str = "") -> Any:
    """A JSON body with its token ids packed."""
    if key.endswith("_ids"):
        return pack_ids(value)
    if key == "openings":
        return [pack_ids(opening) for opening in value]
    if isinstance(value, dict):
        return {name: packed(item, name) for name, item in value.items()}
    return [packed(item) for item in value] if isinstance(value, list) else value


def plain(body: SupportBody) -> Any:
    return json.loads(json.dumps(body.model_dump(warnings=False), default=lambda array: array.tolist()))


@given(st.lists(rollouts(), max_size=4))
def test_both_forms_are_one_body(items: list[dict[str, Any]]) -> None:
    body = {"rollouts": items}
    expected = plain(parse_body(json.dumps(body).encode(), SupportBody, 10, 1000))
    for form in (packed(body), body):  # ids may be lists there too
        assert plain(parse_packed(pack(form), SupportBody, 10, 1000)) == expected


@given(st.binary(max_size=200))
def test_any_bytes_are_a_body_or_refused(data: bytes) -> None:
    start = pack({"rollouts": []})[:-1]
    for body in (data, start + data, start + b"\x91" + data):
        with contextlib.suppress(RequestValidationError, SequenceTooLong):
            assert isinstance(parse_packed(body, SupportBody, 10, 1000), SupportBody)


ROLLOUT = {
    "prompt_ids": pack_ids([1]),
    "response_ids": pack_ids([2, 3]),
    "boundaries": [0, 2],
    "references": [{"token_ids": pack_ids([4, 5]), "start": 0, "end": 1}],
}


def refused(body: bytes, error: type[Exception] = RequestValidationError) -> str:
    with pytest.raises(error) as caught:
        parse_packed(body, SupportBody, 10, 1000)
    return str(caught.value.errors() if isinstance(caught.value, RequestValidationError) else caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_ids": b"1234"}, "'rollouts', 1, 'prompt_ids'.*valid list"),
        ({"prompt_ids": PackedIds(4, b"12345")}, "'rollouts', 1, 'prompt_ids'.*5 bytes of extension type 4 are no"),
        ({"prompt_ids": PackedIds(1, b"1")}, "'rollouts', 1, 'prompt_ids'.*1 bytes of extension type 1 are no"),
        ({"prompt_ids": PackedIds(4, b"\xff\xff\xff\xff")}, "'rollouts', 1, 'prompt_ids'.*4294967295 is no token id"),
        ({"prompt_ids": [-1]}, "'rollouts', 1, 'prompt_ids', 0.*greater than or equal to 0"),
        ({"prompt_ids": "1"}, "'rollouts', 1, 'prompt_ids'.*valid list"),
        ({"boundaries": [3]}, r"boundaries\[0\] = 3 is outside the response"),
        ({"boundaries": b"\0\0\0\0"}, "'boundaries'.*valid list"),
        ({"more": 1}, "'more'.*[Ee]xtra"),
    ],
)
def test_an_error_names_its_place(change: dict[str, Any], said: str) -> None:
    assert re.search(said, refused(pack({"rollouts": [ROLLOUT, {**ROLLOUT, **change}]})))


def test_what_is_no_such_body_is_refused() -> None:
    whole = pack({"rollouts": [ROLLOUT]})
    assert "not MessagePack of this form" in refused(whole[:-1])
    assert "1 bytes follow" in refused(whole + b"\0")
    assert "not a map of 'rollouts' alone" in refused(pack({"items": []}))
    assert "not MessagePack" in refused(b"")
    assert "not MessagePack" in refused(b"\x81\xa8rollouts\x91" + b"\x91" * 10_000)
    assert "cannot be unpacked" in refused(b"\x81\xa8rollouts\x91\xa1\xff")
    assert "more than 10 items" in refused(pack({"rollouts": [ROLLOUT] * 11}))
    # Counted before one is made: a list of a thousand million that is not there.
    assert "more than 10 items" in refused(b"\x81\xa8rollouts\xdd\x3b\x9a\xca\x00")


def test_long_elements_are_not_unpacked() -> None:
    long = {**ROLLOUT, "prompt_ids": pack_ids(range(1000))}
    assert "has 1004 tokens, the limit is 1000" in refused(pack({"rollouts": [long]}), SequenceTooLong)
    long = {**ROLLOUT, "prompt_ids": [1] * 30_000}
    assert "rollouts[0] has more than 1000 tokens" in refused(pack({"rollouts": [long]}), SequenceTooLong)


def test_ids_keep_their_values() -> None:
    for largest, width in ((0, 2), (2**16 - 1, 2), (2**16, 3), (2**24 - 1, 3), (2**24, 4), (2**31 - 1, 4)):
        packed = pack_ids([0, largest, 1])
        assert isinstance(packed, PackedIds) and (packed.code, len(packed.data)) == (width, 3 * width)
        assert unpack_ids(packed).tolist() == [0, largest, 1] and unpack_ids(packed).dtype == np.int64
    assert unpack_ids(PackedIds(3, b"")).tolist() == []
    wrong: list[Any] = [[-1], [2**31], [0.5], ["a"]]
    assert all(pack_ids(values) is values for values in wrong)  # for the server to refuse


def test_it_is_offered_and_named() -> None:
    assert offers_packed({"Accept": "application/json, application/msgpack"})
    assert not offers_packed({}) and not offers_packed({"Accept": "application/json"})
    assert is_packed("Application/MsgPack; v=1") and not is_packed("application/json") and not is_packed(None)


def test_it_is_small() -> None:
    generator = np.random.default_rng(0)
    body = {"rollouts": [{**ROLLOUT, "prompt_ids": generator.integers(0, 151_936, 2000).tolist()}]}
    as_json = json.dumps({"prompt_ids": body["rollouts"][0]["prompt_ids"]}, separators=(",", ":"))
    assert len(as_json) > 2 * len(msgpack.packb(packed(body)))
