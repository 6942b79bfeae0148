"""Calls of a search tool as verl's agent loop makes them."""

import asyncio
from typing import Any

import pytest
from verl.tools.http_tool import SearchRefused, SearchUnavailable
from verl.tools.search_common import SearchTool
from verl.utils.siop.errors import SiopConfigError

QUERY_LIST_SCHEMA = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Searches for passages.",
        "parameters": {
            "type": "object",
            "properties": {"query_list": {"type": "array", "items": {"type": "string"}, "description": "Queries."}},
            "required": ["query_list"],
        },
    },
}


def search_all(tool: SearchTool, *parameters: Any, close: bool = True) -> list[Any]:
    """(text, metrics) or the exception of each call, all at once on one event loop."""

    async def run() -> list[Any]:
        async def one(arguments: Any) -> Any:
            instance, _ = await tool.create()
            try:
                response, reward, metrics = await tool.execute(instance, arguments)
            except (SearchUnavailable, SearchRefused, SiopConfigError) as error:
                with pytest.raises(type(error)):
                    await tool.release(instance)
                return error
            await tool.release(instance)
            assert reward == 0.0
            return response.text, metrics

        results = await asyncio.gather(*(one(p) for p in parameters))
        if close:
            await tool.aclose()
        return results

    return asyncio.run(run())
