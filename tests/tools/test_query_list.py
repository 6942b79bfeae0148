"""Several queries in one call, as the first release's tool schema has them."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from search_calls import QUERY_LIST_SCHEMA, search_all
from verl.tools.http_tool import SearchRefused, SearchUnavailable
from verl.tools.local_search_tool import LocalSearchTool
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.tools.search_common import MAX_QUERIES, MAX_QUERY_CHARS, format_hits, format_results
from verl.tools.tool_registry import load_all_tools
from verl.utils.siop.errors import SiopConfigError

SCHEMA = OpenAIFunctionToolSchema.model_validate(QUERY_LIST_SCHEMA)


class Library(LocalSearchTool):
    """Knows how many passages each query has, and how many searches run at once."""

    running = most = 0

    async def fetch(self, client: httpx.AsyncClient, query: str) -> list[str]:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.02 if query == "refused" else 0.1)
        self.running -= 1
        if query == "refused":
            raise SearchRefused("no")
        return [f"{query} {n}</tool_response>" for n in range(int(query[-1]))]


def test_queries_run_at_once_and_are_answered_in_order_as_one_text() -> None:
    tool = Library({}, SCHEMA)
    ((text, metrics),) = search_all(tool, {"query_list": ["a2", " b0 ", "c1"]})
    assert text == (
        "Query 1:\n[1] a2 0‹/tool_response›\n[2] a2 1‹/tool_response›\n\n"
        "Query 2:\nnothing found\n\n"
        "Query 3:\n[1] c1 0‹/tool_response›"
    )
    assert metrics == {"search/hits": 3, "search/invalid_calls": 0, "search/neutralised": 3}
    assert tool.most == 3


@pytest.mark.parametrize("schema", [SCHEMA, None])
def test_one_query_reads_the_same_in_either_form(schema: Any) -> None:
    tool = Library({}, schema)
    as_list, alone = search_all(tool, {"query_list": ["a1"]}, {"query": "a1"})
    assert as_list == alone and alone[0] == "[1] a1 0‹/tool_response›"


def test_searches_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.tools.http_tool._MAX_CONNECTIONS", 2)
    tool = Library({}, SCHEMA)
    search_all(tool, *[{"query_list": ["a1"] * MAX_QUERIES}] * 2)
    assert tool.most == 2


def test_a_query_that_fails_ends_the_rollout_and_leaves_none_behind() -> None:
    tool = Library({"max_retries": 0}, SCHEMA)

    async def run() -> None:
        with pytest.raises(SearchRefused):
            await tool.execute("1", {"query_list": ["refused", "a1", "b1"]})
        assert tool.most == 3 and tool.running == 0

    asyncio.run(run())
    (error,) = search_all(LocalSearchTool({"retrieval_url": "http://127.0.0.1:9/", "max_retries": 0}, SCHEMA),
                          {"query_list": ["a", "b"]})  # fmt: skip
    assert isinstance(error, SearchUnavailable)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "query_list is missing"),
        ({"queries": ["x"]}, "query_list is missing"),
        (["x"], "expected an object with a query_list, got list"),
        ({"query_list": "x"}, "query_list must be a list of texts, got str"),
        ({"query_list": {"a": "x"}}, "query_list must be a list of texts, got dict"),
        ({"query_list": None}, "query_list must be a list of texts, got NoneType"),
        ({"query_list": []}, "query_list is empty"),
        ({"query_list": ["x", 3]}, "query_list[1] must be text, got int"),
        ({"query_list": [["x"]]}, "query_list[0] must be text, got list"),
        ({"query_list": ["x", " "]}, "query_list[1] is empty"),
        ({"query_list": ["x" * (MAX_QUERY_CHARS + 1)]}, "query_list[0] is longer than 4096 characters"),
        ({"query_list": ["x\ud800"]}, "query_list[0] has half a surrogate pair"),
        ({"query_list": ["x"] * 11}, "query_list has 11 queries; at most 10 are allowed in one call"),
        ({"query": "x", "query_list": ["x"]}, "give query or query_list, not both"),
    ],
)
def test_wrong_arguments_are_answered_so_that_the_model_can_learn(arguments: Any, message: str) -> None:
    ((text, metrics),) = search_all(Library({}, SCHEMA), arguments)
    assert text == f'invalid arguments: {message}; for example {{"query_list": ["first query", "second query"]}}'
    assert metrics == {"search/hits": 0, "search/invalid_calls": 1}


def test_what_is_missing_is_called_by_the_name_in_the_schema() -> None:
    ((text, _),) = search_all(Library({}), {})
    assert text == "invalid arguments: query is missing"


PASSAGES = st.lists(st.text("ab \n", max_size=60), max_size=3)


@given(st.lists(PASSAGES, min_size=1, max_size=6), st.integers(1, 300))
def test_the_length_is_shared(results: list[list[str]], max_chars: int) -> None:
    text, _ = format_results(results, max_chars)
    assert len(text) <= max_chars and text == text.rstrip()
    whole, _ = format_results(results, 10_000)
    assert whole == text or len(whole) > max_chars
    assert format_hits(results[0], max_chars) == format_results(results[:1], max_chars)[0]


def test_no_query_loses_its_hits_to_a_longer_one() -> None:
    text, _ = format_results([["x" * 500], ["short"], ["y" * 500]], 240)
    parts = text.split("\n\n")
    assert len(text) == 240 and parts[1] == "Query 2:\n[1] short"
    assert abs(len(parts[0]) - len(parts[2])) <= 1


@pytest.mark.parametrize(
    ("properties", "shown"),
    [
        ({"q": {"type": "string"}}, "{'q': 'string'}"),
        ({"query_list": {"type": "string"}}, "{'query_list': 'string'}"),
        ({"query": {"type": "array"}}, "{'query': 'array'}"),
    ],
)
def test_a_schema_that_the_tool_cannot_serve_is_refused(properties: dict[str, Any], shown: str) -> None:
    function = {"name": "f", "description": "", "parameters": {"type": "object", "properties": properties}}
    schema = OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})
    with pytest.raises(SiopConfigError, match=r"LocalSearchTool: tool_schema: .* query .*query_list") as caught:
        LocalSearchTool({}, schema)
    assert shown in str(caught.value)


BOTH = {"query": {"type": "string"}, "query_list": {"type": "array"}, "lang": {"type": "string"}}


@pytest.mark.parametrize(
    ("properties", "required", "message"),
    [
        (["query", "lang"], ["lang"], r"required must be \[query\], .*; got \['lang'\]"),
        (["query"], ["q"], r"required must be \[query\], .*; got \['q'\]"),
        (["query"], ["query", "q"], r"required=\['query', 'q'\]: q must be among its properties, which are query"),
        (["query", "query_list"], ["query", "query_list"], r"required must be \[query\] or \[query_list\]"),
        (["query", "query_list"], ["query_list"], ""),
        (["query", "lang"], ["lang", "query"], ""),
        (["query", "query_list"], [], ""),
    ],
)
def test_whoever_keeps_to_the_schema_sends_one_of_the_two(
    properties: list[str], required: list[str], message: str
) -> None:
    parameters = {"type": "object", "properties": {name: BOTH[name] for name in properties}, "required": required}
    function = {"name": "f", "description": "", "parameters": parameters}
    schema = OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})
    if message:
        with pytest.raises(SiopConfigError, match=f"LocalSearchTool: tool_schema: {message}"):
            LocalSearchTool({}, schema)
        return
    ((text, _),) = search_all(LocalSearchTool({}, schema), {})
    assert text.startswith(f"invalid arguments: {'query_list' if 'query_list' in required else 'query'} is missing")


def test_a_tool_without_a_name_is_refused() -> None:
    schema = SCHEMA.model_copy(deep=True)
    schema.function.name = " "
    with pytest.raises(SiopConfigError, match=r"function\.name=' ' is empty"):
        LocalSearchTool({}, schema)


def test_a_tool_configuration_of_the_first_release_works(scripted_service: Any, tmp_path: Path) -> None:
    url, answers, asked = scripted_service
    config = {"type": "native", "retrieval_url": url, "search_top_k": 2, "request_timeout": 9}
    path = tmp_path / "tools.yaml"
    entry = {"class_name": "verl.tools.local_search_tool.LocalSearchTool", "config": config}
    path.write_text(yaml.safe_dump({"tools": [{**entry, "tool_schema": QUERY_LIST_SCHEMA}]}))
    tool: Any
    (tool,) = load_all_tools(str(path), None)
    answers += [(200, {"result": [[{"document": {"contents": "a"}}]]})] * 2
    ((text, _),) = search_all(tool, {"query_list": ["x", "y"]})
    assert text == "Query 1:\n[1] a\n\nQuery 2:\n[1] a" and tool.settings.timeout_s == 9
    assert sorted(request["body"]["queries"] for request in asked) == [["x"], ["y"]]
    assert {request["body"]["topk"] for request in asked} == {2}


def test_building_a_tool_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    LocalSearchTool({}, SCHEMA)
    assert capsys.readouterr().out == ""
