"""JSON request bodies, checked in a thread and in small steps, so that the event loop goes on meanwhile.

Python's JSON and pydantic parsers do not let other threads run while they work: a body of 30 MB would stop the event
loop for a second, in a thread as well. All bodies of the service are an object with one list of objects, so they are
cut into the elements of this list, and each is parsed by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar, get_args

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from verl.utils.siop.errors import SequenceTooLong

Model = TypeVar("Model", bound=BaseModel)

MAX_ERRORS = 20
MAX_NESTING = 16  # no valid body is nested as deep
SPARE_COMMAS = 4096  # no valid element has as many beside those between its tokens

_MARK = re.compile(rb'["\[\]{}]')
_AFTER_ELEMENT = re.compile(rb"\s*([,\]])\s*")
_BACKSLASH = ord("\\")


def parse_body(body: bytes, model: type[Model], max_items: int, max_item_tokens: int | None = None) -> Model:
    """The body as a ``model``, whose only field is a list of models.

    Args:
        body: JSON.
        model: what it should be.
        max_items: longest list.
        max_item_tokens: an element with so many commas that it has more tokens than this is not parsed; its exact
            number is for the caller to check. None where elements are texts.

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
        with _errors_at("body"):
            model.model_validate_json(body)
        raise _invalid(("body",), f'must begin with {{"{field}": [', "unexpected_layout")

    spans, end = found
    if len(spans) > max_items:
        raise _invalid(("body", field), f"more than {max_items} items (--max-items)", "too_long")
    values: list[BaseModel] = []
    errors: list[Any] = []
    for index, (first, last) in enumerate(spans):
        if max_item_tokens is not None and body.count(b",", first, last) > max_item_tokens + SPARE_COMMAS:
            raise SequenceTooLong(f"{field}[{index}] has more than {max_item_tokens} tokens (--max-item-tokens)")
        try:
            with _errors_at("body", field, index):
                values.append(element.model_validate_json(body[first:last]))
        except RequestValidationError as error:
            errors += error.errors()
            if len(errors) >= MAX_ERRORS:
                break
    if errors:
        raise RequestValidationError(errors)
    # What is around the elements must be an empty request.
    with _errors_at("body"):
        rest = model.model_validate_json(body[: start.end()] + body[end:])
    if getattr(rest, field):
        raise _invalid(("body", field), "is there twice", "repeated_key")
    setattr(rest, field, values)
    return rest


def _elements(body: bytes, at: int, max_items: int) -> tuple[list[tuple[int, int]], int] | None:
    """Start and end of each object in the list that begins at ``at``, and where the list ends; None if it is no list of
    objects. Gives up after ``max_items`` + 1 objects."""
    spans: list[tuple[int, int]] = []
    if body[at : at + 1] == b"]":
        return spans, at
    while len(spans) <= max_items:
        end = _object_end(body, at)
        after = _AFTER_ELEMENT.match(body, end) if end is not None else None
        if end is None or after is None:
            return None
        spans.append((at, end))
        if after[1] == b"]":
            return spans, after.start(1)
        at = after.end()
    return spans, at


def _object_end(body: bytes, at: int) -> int | None:
    if body[at : at + 1] != b"{":
        return None
    depth = 0
    while (mark := _MARK.search(body, at)) is not None:
        at = mark.end()
        if mark[0] == b'"':
            if (end := _string_end(body, at)) is None:
                return None
            at = end
        elif mark[0] in b"[{":
            depth += 1
            if depth > MAX_NESTING:
                return None
        else:
            depth -= 1
            if depth == 0:
                return at
    return None


def _string_end(body: bytes, at: int) -> int | None:
    # Not one regular expression: on a long string it would hold up the other threads.
    while (quote := body.find(b'"', at)) >= 0:
        before = quote
        while body[before - 1] == _BACKSLASH:
            before -= 1
        if (quote - before) % 2 == 0:
            return quote + 1
        at = quote + 1
    return None


@contextlib.contextmanager
def _errors_at(*loc: str | int) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**one, "loc": (*loc, *one["loc"])} for one in found]) from error


def _invalid(loc: tuple[str | int, ...], message: str, kind: str) -> RequestValidationError:
    return RequestValidationError([{"loc": loc, "msg": message, "type": kind}])


class _ParsedRequest(Request):
    """A request whose JSON is a model already; FastAPI takes it as it is."""

    parsed: BaseModel

    async def json(self) -> Any:
        return self.parsed


def route_class(parse: Callable[[bytes, type[BaseModel]], BaseModel]) -> type[APIRoute]:
    """Routes that have ``parse(body, model)`` called in a thread for JSON bodies; all else is as FastAPI does it."""

    class ThreadedBodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()
            if self.body_field is None:
                return handler
            model: Any = self.body_field.field_info.annotation

            async def handle(request: Request) -> Response:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                body = await request.body()
                if not body or not re.fullmatch(r"application/(.+\+)?json", kind):
                    return await handler(request)
                parsed = _ParsedRequest(request.scope, request.receive)
                parsed._body = body
                parsed.parsed = await asyncio.to_thread(parse, body, model)
                return await handler(parsed)

            return handle

    return ThreadedBodyRoute
