"""Reading a document page by page: no text is on no page, whatever its title; and several replicas."""

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.tools.http_tool import SearchRefused
from verl.tools.local_read_tool import HEADING_CHARS, MIN_CHARS, LocalReadTool
from verl.tools.local_search_tool import LocalSearchTool
from verl.trainer.siop.checks.policy import check_tool_length
from verl.utils.siop.errors import SiopConfigError


class Reader:
    """A service with one document, as the retriever's ``POST /read``."""

    def __init__(self, title: str, text: str, page_limit: int = 10**5) -> None:
        self.status, self.asked = 200, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked += 1
                size, page = body["page_chars"], body["page"]
                status = outer.status if size <= page_limit else 422
                shown, pages = text[(page - 1) * size : page * size], max(1, -(-len(text) // size))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps({"result": {"title": title, "text": shown, "pages": pages}}).encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/retrieve"
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def readers() -> Iterator[list[Reader]]:
    made: list[Reader] = []
    yield made
    for reader in made:
        reader.server.shutdown()
        reader.server.server_close()


def read(tool: LocalReadTool, title: str, *pages: int) -> list[str]:
    async def run() -> list[str]:
        found = []
        for page in pages:
            response, _, _ = await tool.execute("x", {"title": title, "page": page})
            found.append(response.text or "")
        await tool.aclose()
        return found

    return asyncio.run(run())


def tool_of(max_chars: int, *made: Reader, **more: Any) -> LocalReadTool:
    urls = ",".join(reader.url for reader in made) or "http://127.0.0.1:1/retrieve"
    return LocalReadTool({"retrieval_service_url": urls, "max_chars": max_chars, **more})


@pytest.mark.parametrize("max_chars", [MIN_CHARS, 99, 200, 600])
@pytest.mark.parametrize("title", ["77", "A very long title " * 12])
@pytest.mark.parametrize("asked", ["77", "A very long title " * 12])
def test_all_pages_together_are_the_document(readers: list[Reader], max_chars: int, title: str, asked: str) -> None:
    text = "".join(f"{i:04d}: " for i in range(400))  # a page may begin or end with a space
    readers.append(Reader(title, text))
    tool = tool_of(max_chars, *readers)
    count = -(-len(text) // (max_chars - min(HEADING_CHARS, max_chars // 2)))
    found = read(tool, asked, *range(1, count + 2))
    assert found.pop() == f"invalid arguments: the document has {count} page(s)"
    assert max(map(len, found)) <= max_chars
    assert "".join(page.partition("\n")[2] for page in found) == text
    heading = found[0].partition("\n")[0]
    assert heading.endswith(f" (page 1 of {count})") and title.startswith(heading.partition(" (page")[0])


def test_a_page_is_no_longer_than_the_service_allows(readers: list[Reader]) -> None:
    readers.append(Reader("t", "x" * 150_000))
    one, two = read(tool_of(10**6, *readers), "t", 1, 2)
    assert len(one) == len("t (page 1 of 2)\n") + 100_000 and len(two) == len(one) - 50_000


def test_a_page_that_is_too_long_is_refused(readers: list[Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    readers.append(Reader("t", "x" * 500))
    tool = tool_of(200, *readers)
    monkeypatch.setattr("verl.tools.local_read_tool.MAX_PAGE_CHARS", 100)
    assert len(read(tool, "t", 1)[0]) < 200

    async def more(*args: Any, **kwargs: Any) -> Any:
        return {"result": {"title": "t", "text": "x" * 300, "pages": 1}}

    monkeypatch.setattr("verl.tools.local_read_tool.post", more)
    with pytest.raises(SearchRefused, match="no document, or too long a page"):
        read(tool, "t", 1)


def test_replicas_are_asked_by_turns_and_after_a_failure_the_next(readers: list[Reader]) -> None:
    readers += [Reader("t", "text"), Reader("t", "text"), Reader("t", "text")]
    assert len(read(tool_of(200, *readers), "t", *[1] * 9)) == 9
    assert [reader.asked for reader in readers] == [3, 3, 3]
    readers[0].status = readers[1].status = 503
    found = read(tool_of(200, *readers, max_retries=2), "t", 1, 1, 1)
    assert found == ["t (page 1 of 1)\ntext"] * 3
    assert tool_of(200, *readers).address == ", ".join(r.url.replace("/retrieve", "/read") for r in readers)


def test_too_little_room_is_refused() -> None:
    with pytest.raises(SiopConfigError, match=r"LocalReadTool: max_chars must be at least 64, got 63"):
        tool_of(63)


@pytest.mark.parametrize("side", ["right", "middle"])
def test_pages_that_verl_would_cut_are_refused_before_the_run(side: str) -> None:
    multi_turn = {"max_tool_response_length": 2048, "tool_response_truncate_side": side}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"multi_turn": multi_turn}}})
    with pytest.raises(SiopConfigError, match=r"=2048 is below max_chars=4000 of the tool 'read'.* to 2048 at most"):
        check_tool_length(config, {"read": LocalReadTool({})})
    check_tool_length(config, {"read": tool_of(2048)})
    if side == "right":  # the end of a search's result is its last passage
        check_tool_length(config, {"search": LocalSearchTool({})})
