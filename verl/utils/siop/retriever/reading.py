"""``POST /read``: more of a document than the passage that a search has found."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from verl.utils.siop.retriever.documents import Documents

MAX_TITLE_CHARS, MAX_PAGE, MAX_PAGE_CHARS = 512, 10**6, 10**5


class ReadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: Annotated[StrictStr, Field(min_length=1, max_length=MAX_TITLE_CHARS)]
    page: Annotated[StrictInt, Field(ge=1, le=MAX_PAGE)] = 1
    page_chars: Annotated[StrictInt, Field(ge=1, le=MAX_PAGE_CHARS)] = 4000


def reading(documents: Documents) -> APIRouter:
    """The route, over the documents of a corpus.

    ``{"title": "Marie Curie", "page": 1, "page_chars": 4000}`` -> ``{"result": {"title", "text", "pages"}}``; the
    title may be an id. ``{"result": null}`` if there is no such document.
    """
    router = APIRouter()

    # Not async, as /retrieve.
    @router.post("/read")
    def read(request: ReadRequest) -> dict[str, Any]:
        return {"result": documents.read(request.title, request.page, request.page_chars)}

    return router
