"""The page in `page/`: three files, read once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


def add_page(app: FastAPI) -> None:
    """Add the routes of the page to an application."""
    for place, (name, kind) in FILES.items():
        make = partial(_file, (FOLDER / name).read_bytes(), kind)
        app.add_api_route(place, make, methods=["GET"], include_in_schema=False, response_class=Response)


async def _file(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind, headers={"cache-control": "no-cache"})
