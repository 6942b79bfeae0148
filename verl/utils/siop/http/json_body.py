"""JSON and MessagePack bodies, checked in a thread and in small steps, so that the event loop goes on meanwhile.

Python's JSON and pydantic parsers do not let other threads run while they work: a body of 30 MB would stop the event
loop for a second, in a thread as well. All bodies of the scorer are an object with one list of objects, so they are cut
into the elements of this list, and each is parsed by itself.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar, get_args

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from verl.utils.siop.errors import SequenceTooLong
from verl.utils.siop.http import packed

Model = TypeVar("Model", bound=BaseModel)

MAX_ERRORS = 20
MAX_NESTING = 16  # no valid body is nested as deep
SPARE_NUMBERS = 4096  # no valid element has as many beside its tokens

_BETWEEN_ELEMENTS, _IN_ELEMENT = re.compile(rb'["\[\]{},]'), re.compile(rb'["\[\]{}]')
_BACKSLASH = ord("\\")


class JsonRoute(APIRoute):
    """Route whose body, a model, is made by :func:`parse_body` in a thread; all else is as FastAPI does it.

    ``app.state.max_items`` and ``app.state.max_item_tokens`` are the limits.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, which finds the JSON of the request parsed."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler
        model: Any = self.body_field.field_info.annotation

        async def handle(request: Request) -> Response:
            limits = request.app.state.max_items, request.app.state.max_item_tokens
            body = await request.body()
            if packed.is_packed(request.headers.get("content-type")):
                # What FastAPI takes where the content is not JSON.
                request._body = await asyncio.to_thread(parse_packed, body, model, *limits)
            else:
                request._json = await asyncio.to_thread(parse_body, body, model, *limits)
            return await handler(request)

        return handle


def parse_body(body: bytes, model: type[Model], max_items: int, max_item_tokens: int) -> Model:
    """The body as a ``model``, whose only field is a list of models.

    Args:
        body: JSON.
        model: what it should be.
        max_items: longest list.
        max_item_tokens: most tokens of an element, where elements have ``num_tokens``. Those with far more commas than
            that are not even parsed.

    Raises:
        RequestValidationError: it is not a ``model``; with about ``MAX_ERRORS`` errors, without the input.
        SequenceTooLong: an element has too many tokens.
    """
    ((field, info),) = model.model_fields.items()
    element: type[BaseModel] = get_args(info.annotation)[0]
    start = re.match(rb'\s*\{\s*"%s"\s*:\s*\[\s*' % field.encode(), body)
    found = _elements(body, start.end(), max_items) if start else None
    if start is None or found is None:
        # Not the expected JSON: what is wrong with it is for the parser to say.
        _checked(lambda: model.model_validate_json(body))
        raise _invalid(f'must begin with {{"{field}": [', "unexpected_layout")

    spans, end = found
    if len(spans) > max_items:
        raise _invalid(f"more than {max_items} items (--max-items)", "too_long", field)

    def is_long(first: int, last: int) -> bool:
        return body.count(b",", first, last) > max_item_tokens + SPARE_NUMBERS

    def read(first: int, last: int) -> Any:
        return element.model_validate_json(body[first:last])

    values = _values(element, field, spans, max_item_tokens, is_long, read)
    # What is around the elements must be an empty request.
    rest = _checked(lambda: model.model_validate_json(body[: start.end()] + body[end:]))
    if getattr(rest, field):
        raise _invalid("is there twice", "repeated_key", field)
    setattr(rest, field, values)
    return rest


def parse_packed(body: bytes, model: type[Model], max_items: int, max_item_tokens: int) -> Model:
    """As :func:`parse_body`, of MessagePack."""
    ((field, info),) = model.model_fields.items()
    element: type[BaseModel] = get_args(info.annotation)[0]
    try:
        spans = packed.spans(body, field, max_items)
    except ValueError as error:
        raise _invalid(str(error), "unexpected_layout") from error
    if spans is None:
        raise _invalid(f"more than {max_items} items (--max-items)", "too_long", field)

    def is_long(first: int, last: int) -> bool:
        return last - first > packed.most_bytes(max_item_tokens, SPARE_NUMBERS)

    def read(first: int, last: int) -> Any:
        try:
            value = packed.element(body[first:last])
        except ValueError as error:
            raise _invalid(str(error), "unexpected_layout", field) from error
        return element.model_validate(value)

    return model.model_construct(None, **{field: _values(element, field, spans, max_item_tokens, is_long, read)})


def _values(
    element: type[BaseModel],
    field: str,
    spans: Iterable[tuple[int, int]],
    max_item_tokens: int,
    is_long: Callable[[int, int], bool],
    read: Callable[[int, int], BaseModel],
) -> list[BaseModel]:
    """What ``read`` makes of each span, unless it ``is_long``."""
    values: list[BaseModel] = []
    errors: list[Any] = []
    for index, span in enumerate(spans):
        if hasattr(element, "num_tokens") and is_long(*span):
            raise SequenceTooLong(f"{field}[{index}] has more than {max_item_tokens} tokens (--max-item-tokens)")
        try:
            values.append(_checked(functools.partial(read, *span), field, index))
        except RequestValidationError as error:
            errors += error.errors()
            if len(errors) >= MAX_ERRORS:
                break
            continue
        if (tokens := getattr(values[-1], "num_tokens", 0)) > max_item_tokens:
            raise SequenceTooLong(
                f"{field}[{index}] has {tokens} tokens, the limit is {max_item_tokens} (--max-item-tokens)"
            )
    if errors:
        raise RequestValidationError(errors)
    return values


def _elements(body: bytes, at: int, max_items: int) -> tuple[list[tuple[int, int]], int] | None:
    """Start and end of each element in the list that begins at ``at``, and where the list ends; None if it has no end.

    By hand, because a parser would make a million elements before it counts them. It gives up after ``max_items`` + 1.
    What it takes for elements may be none: that is for the parser of each to say.
    """
    spans: list[tuple[int, int]] = []
    first, depth = at, 0
    while (mark := (_IN_ELEMENT if depth else _BETWEEN_ELEMENTS).search(body, at)) is not None:
        at = mark.end()
        if mark[0] == b'"':
            if (at := _string_end(body, at)) < 0:
                return None
        elif mark[0] in b"[{":
            depth += 1
            if depth > MAX_NESTING:
                return None
        elif depth:
            depth -= 1
        else:
            if mark[0] == b"," or spans or body[first : mark.start()].strip():
                spans.append((first, mark.start()))
            if mark[0] != b"," or len(spans) > max_items:
                return spans, mark.start()
            first = at
    return None


def _string_end(body: bytes, at: int) -> int:
    # Not one regular expression: on a long string it would hold up the other threads.
    while (quote := body.find(b'"', at)) >= 0:
        before = quote
        while body[before - 1] == _BACKSLASH:
            before -= 1
        if (quote - before) % 2 == 0:
            return quote + 1
        at = quote + 1
    return -1


def _checked(read: Callable[[], Model], *loc: str | int) -> Model:
    try:
        return read()
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**one, "loc": ("body", *loc, *one["loc"])} for one in found]) from error


def _invalid(message: str, kind: str, *loc: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", *loc), "msg": message, "type": kind}])


async def answer_invalid(request: Request, error: RequestValidationError) -> Response:
    """Answer 422 with the first ``MAX_ERRORS`` errors, in bounded length.

    FastAPI's own repeats the input, which may be megabytes of token ids, or nothing that JSON can hold.
    """
    detail = [
        {"type": e["type"], "loc": [p[:100] if isinstance(p, str) else p for p in e["loc"]], "msg": e["msg"][:500]}
        for e in error.errors()[:MAX_ERRORS]
    ]
    kind = request.headers.get("content-type", "none")
    for one in detail:
        # FastAPI does not parse it then.
        if one["loc"] == ["body"] and "json" not in kind:
            one["msg"] += f"; a body is read with the header Content-Type: application/json, got {kind[:100]}"
    if (more := len(error.errors()) - MAX_ERRORS) > 0:
        detail.append({"type": "truncated", "loc": ["body"], "msg": f"and {more} more errors"})
    return Response(json.dumps({"detail": detail}), status_code=422, media_type="application/json")
