"""Keys of a search tool's configuration: the first release's names, and what is refused before any service is asked."""

from typing import Any

import pytest
from verl.tools.local_search_tool import LocalSearchTool
from verl.tools.serper_search_tool import SerperSearchTool
from verl.utils.siop.errors import SiopConfigError


@pytest.mark.parametrize(
    ("tool", "alias", "key", "value"),
    [
        (LocalSearchTool, "retrieval_url", "retrieval_service_url", "http://x/retrieve"),
        (LocalSearchTool, "search_top_k", "topk", 7),
        (LocalSearchTool, "request_timeout", "timeout_s", 7),
        (LocalSearchTool, "timeout", "timeout_s", 7),
        (SerperSearchTool, "search_top_k", "topk", 7),
        (SerperSearchTool, "serper_api_key", "api_key", "other"),
        (SerperSearchTool, "search_region", "country", "de"),
        (SerperSearchTool, "search_lang", "language", "de"),
    ],
)
def test_names_of_the_first_release(
    tool: Any, alias: str, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "k")
    assert getattr(tool({alias: value}).settings, key) == value
    assert getattr(tool({alias: value, key: value, "type": "native"}).settings, key) == value
    different = "http://other/x" if isinstance(value, str) else value + 1
    for config in ({alias: value, key: different}, {key: different, alias: value}):
        with pytest.raises(SiopConfigError, match=f"{tool.__name__}: .*mean the same and have different") as caught:
            tool(config)
        assert alias in str(caught.value) and key in str(caught.value)
        assert str(value) not in str(caught.value).split()


def test_two_aliases_of_one_key() -> None:
    with pytest.raises(SiopConfigError, match="timeout and request_timeout mean the same"):
        LocalSearchTool({"timeout": 3, "request_timeout": 4})


def test_an_unknown_key_is_refused_with_all_names() -> None:
    with pytest.raises(SiopConfigError) as caught:
        LocalSearchTool({"topn": 3, "serper_api_key": "s3cret"})
    assert str(caught.value) == (
        "LocalSearchTool: unknown config key(s) serper_api_key, topn; allowed: topk, timeout_s, max_retries, "
        "max_chars, retrieval_service_url; also known as: search_top_k, request_timeout, timeout, retrieval_url"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"serper_api_key": "s3cret", "api_key": "other"},
        {"api_key": ["s3cret"]},
        {"api_key": "s3cret with spaces"},
        {"api_key": "s3cret", "api_url": "ftp://user:s3cret@host/"},
        {"api_key": "s3cret", "top": 3},
        {"serper_api_key": "s3cret", "topk": 0},
    ],
)
def test_no_message_shows_a_secret(config: dict[str, Any]) -> None:
    with pytest.raises(SiopConfigError) as caught:
        SerperSearchTool(config)
    assert "s3cret" not in str(caught.value)
