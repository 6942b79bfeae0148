"""The cache of the web search: what it saves, what it replays without a key, and many processes on one folder."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from search_calls import search_all
from verl.tools.http_tool import SearchUnavailable
from verl.tools.search_cache import SearchCache
from verl.tools.serper_search_tool import SerperSearchTool
from verl.utils.siop.errors import SiopConfigError

HITS = [{"title": "T", "snippet": "S", "link": "http://x"}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SERPER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    return tmp_path / "cache"


def serper(url: str, key: str = "s3cret", **config: Any) -> SerperSearchTool:
    return SerperSearchTool({"api_url": url, "api_key": key, "max_retries": 0, **config})


def test_a_search_is_paid_for_once_and_replayed_without_a_key(scripted_service: Any, folder: Path) -> None:
    url, answers, asked = scripted_service
    answers += [(200, {"organic": HITS, "searchParameters": {"key": "s3cret"}}), (200, {"searchParameters": {}})]
    tool = serper(url)
    assert not folder.exists()  # building a tool writes nothing
    first, empty = search_all(tool, {"query": "x"})[0], search_all(tool, {"query": "nothing"})[0]
    assert first == ("[1] T: S", {"search/hits": 1, "search/invalid_calls": 0, "search/cache_hits": 0,
                                  "search/cache_misses": 1})  # fmt: skip
    replayed = search_all(serper(url, key=""), {"query": "x"}, {"query": " nothing "})
    assert [text for text, _ in replayed] == ["[1] T: S", empty[0]] == ["[1] T: S", "nothing found"]
    assert [metrics["search/cache_hits"] for _, metrics in replayed] == [1, 1]
    assert len(asked) == 2
    stored = "".join(path.read_text() for path in folder.rglob("*.json"))
    assert "s3cret" not in stored and len(list(folder.rglob("*"))) == 4


def test_hits_and_misses_of_one_call(scripted_service: Any, folder: Path) -> None:
    url, answers, _ = scripted_service
    answers += [(200, {"organic": HITS})] * 3
    tool = serper(url)
    search_all(tool, {"query": "x"})
    ((_, metrics),) = search_all(tool, {"query_list": ["x", "y", "z", "x"]})
    assert (metrics["search/cache_hits"], metrics["search/cache_misses"], metrics["search/hits"]) == (2, 2, 4)


@pytest.mark.parametrize(
    ("change", "url_suffix"), [({"topk": 4}, ""), ({"country": "de"}, ""), ({"language": "de"}, ""), ({}, "?engine=b")]
)
def test_another_request_is_another_entry(
    scripted_service: Any, folder: Path, change: dict[str, Any], url_suffix: str
) -> None:
    url, answers, asked = scripted_service
    answers += [(200, {"organic": HITS}), (200, {"organic": []})]
    search_all(serper(url), {"query": "x"})
    ((text, _),) = search_all(serper(url + url_suffix, **change), {"query": "x"})
    assert text == "nothing found" and len(asked) == 2


def test_another_key_or_password_is_not(scripted_service: Any, folder: Path) -> None:
    url, answers, _ = scripted_service
    answers.append((200, {"organic": HITS}))
    search_all(serper(url), {"query": "x"})
    assert search_all(serper(url.replace("//", "//u:pa55@"), key="k"), {"query": "x"})[0][0] == "[1] T: S"


def test_failures_are_not_stored(scripted_service: Any, folder: Path) -> None:
    url, answers, _ = scripted_service
    answers += [(500, {}), (403, {}), (200, {"organic": "x"}), (200, {"organic": [{"title": 3}]}),
                (200, {"message": "rate limit exceeded"}), (200, {}), (200, []), (200, None)]  # fmt: skip
    for _ in range(8):
        assert isinstance(search_all(serper(url), {"query": "x"})[0], Exception)
    assert not folder.exists()


def test_without_a_key_a_miss_names_key_and_folder(scripted_service: Any, folder: Path) -> None:
    url, answers, _ = scripted_service
    with pytest.raises(SiopConfigError, match=r"SERPER_API_KEY.*SERPER_CACHE_DIR"):
        serper(url, key="")
    answers.append((200, {"organic": HITS}))
    search_all(serper(url), {"query": "x"})
    (error,) = search_all(serper(url, key=""), {"query": "other"})
    assert isinstance(error, SiopConfigError)
    assert "SERPER_API_KEY" in str(error) and str(folder) in str(error) and "'other'" in str(error)


WRONG_HITS: list[Any] = [{}, "", None, [3], [{"title": 5}], [{"snippet": ["S"]}]]


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"body": {}, "organic": []}', '{"organic": 3}', "\xff", "[" * 9999,
                                    *WRONG_HITS])  # fmt: skip
def test_a_damaged_entry_is_fetched_again_and_said(
    scripted_service: Any, folder: Path, broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url, answers, asked = scripted_service
    answers += [(200, {"organic": HITS})] * 2
    search_all(serper(url), {"query": "x"})
    (entry,) = folder.rglob("*.json")
    whole = entry.read_text()
    if broken in WRONG_HITS:
        broken = json.dumps({**json.loads(whole), "organic": broken})
    entry.write_bytes(broken.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        (without_key,) = search_all(serper(url, key=""), {"query": "x"})
        assert isinstance(without_key, SiopConfigError)
        assert search_all(serper(url), {"query": "x"})[0][0] == "[1] T: S"
    assert str(entry) in caplog.text and len(asked) == 2 and entry.read_text() == whole


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_a_miss_and_not_waited_for(scripted_service: Any, folder: Path, make: Any) -> None:
    url, answers, _ = scripted_service
    answers += [(200, {"organic": HITS})] * 2
    search_all(serper(url), {"query": "x"})
    (entry,) = folder.rglob("*.json")
    entry.unlink()
    make(entry)
    assert search_all(serper(url), {"query": "x"})[0][0] == "[1] T: S"


def test_the_home_of_the_user_is_meant_by_its_sign(
    scripted_service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers, _ = scripted_service
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SERPER_CACHE_DIR", "~/cache")
    answers.append((200, {"organic": HITS}))
    search_all(serper(url), {"query": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and len(list(tmp_path.rglob("home/cache/*/*"))) == 1


@pytest.mark.parametrize("name", ["~no_such_user/cache", "x" * 300])
def test_a_folder_that_cannot_be_named(name: str) -> None:
    with pytest.raises(SiopConfigError, match=r"SERPER_CACHE_DIR=.*must be a folder"):
        SearchCache(name, writable=True)


def test_what_the_service_says_in_place_of_a_result(scripted_service: Any, folder: Path) -> None:
    url, answers, asked = scripted_service
    answers += [(200, {"message": "rate limit of s3cret exceeded"}), (200, {"organic": HITS})]
    assert search_all(serper(url, max_retries=1), {"query": "x"})[0][0] == "[1] T: S" and len(asked) == 2
    answers.append((200, {"message": "rate limit of s3cret exceeded"}))
    (error,) = search_all(serper(url), {"query": "y"})
    assert isinstance(error, SearchUnavailable) and "rate limit of [secret] exceeded" in str(error)


def test_no_cache_and_no_mock(scripted_service: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, answers, asked = scripted_service
    monkeypatch.setenv("SERPER_CACHE_DIR", "")
    answers += [(200, {"organic": HITS})] * 2
    for _ in range(2):
        ((_, metrics),) = search_all(serper(url), {"query": "x"})
    assert len(asked) == 2 and "search/cache_hits" not in metrics
    monkeypatch.setenv("SERPER_MOCK", "1")
    with pytest.raises(SiopConfigError, match=r"SERPER_MOCK is not used here.*SERPER_CACHE_DIR"):
        serper(url)


def test_the_folder_is_search_cache_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERPER_CACHE_DIR")
    monkeypatch.chdir(tmp_path)
    cache = serper("http://x/")._cache
    assert cache is not None and cache.path == tmp_path / "search_cache"


def test_a_folder_that_cannot_be_used(folder: Path, scripted_service: Any, caplog: pytest.LogCaptureFixture) -> None:
    url, answers, _ = scripted_service
    folder.write_text("a file")
    with pytest.raises(SiopConfigError, match=r"SERPER_CACHE_DIR=.*must be a folder that can be written"):
        serper(url)
    folder.unlink()
    tool = serper(url)
    folder.write_text("a file")  # in the middle of a run: paid searches go on, and it is said once
    answers += [(200, {"organic": HITS})] * 2
    with caplog.at_level(logging.ERROR):
        assert [search_all(tool, {"query": query})[0][0] for query in "xy"] == ["[1] T: S"] * 2
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1 and str(folder) in caplog.text


def test_processes_share_a_folder(folder: Path) -> None:
    script = f"""
import sys
import time
from pathlib import Path
from verl.tools.search_cache import SearchCache
cache = SearchCache(Path({str(folder)!r}), writable=True)
while True:
    cache.write("http://x/", {{"q": "x"}}, [{{"title": sys.argv[1] * 300_000}}])
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, letter]) for letter in "ab"]
    try:
        cache = SearchCache(folder, writable=False)
        seen: set[str] = set()
        deadline = time.monotonic() + 120
        while len(seen) < 2 and time.monotonic() < deadline:
            found = cache.read("http://x/", {"q": "x"})
            if not seen and found is None:
                continue
            assert found is not None and len(found[0]["title"]) == 300_000, "part of an entry was read"
            seen.update(found[0]["title"])
        for _ in range(200):
            assert cache.read("http://x/", {"q": "x"}) is not None, "part of an entry was read"
        assert seen == {"a", "b"} and [writer.poll() for writer in writers] == [None, None]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


def test_names_of_entries_are_bounded(folder: Path) -> None:
    cache = SearchCache(folder, writable=True)
    body = {"q": "x" * 4096 + "/..\0"}
    cache.write("http://user:pa55@x/?a=b", body, HITS)
    assert cache.read("http://x/?a=b", body) == HITS and not cache.is_empty()
    (entry,) = folder.rglob("*.json")
    assert len(entry.name) < 80 and json.loads(entry.read_text())["url"] == "http://x/"


def test_a_service_that_is_down_needs_no_cache_to_say_so(folder: Path) -> None:
    (error,) = search_all(serper("http://127.0.0.1:9/"), {"query": "x"})
    assert isinstance(error, SearchUnavailable)
