"""The page at `/`: a few static files, read once and sent from memory. It loads no code from other sites."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response

from serve_app.gateway.body_bounds import BoundedRoute
from serve_app.gateway.shared import Parts
from serve_app.wire.refusals import Code, Refusal

FOLDER = Path(__file__).parents[1] / "page"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_HEADERS = {
    # A new version of the gateway may have other files.
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def page_router() -> APIRouter:
    """Return the routes of the page. This reads its files."""
    files = {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.suffix in _TYPES}
    router = APIRouter(route_class=BoundedRoute)

    @router.get("/", response_class=Response, include_in_schema=False)
    async def read_page(request: Request) -> Response:
        """Send the page, with the policy of what it may load."""
        parts: Parts = request.app.state.parts
        policy = await parts.run(partial(_policy, parts))
        return _answer("index.html", {"Content-Security-Policy": policy})

    @router.get("/page/{name}", response_class=Response, include_in_schema=False)
    async def read_file(name: str) -> Response:
        """Send one of the files that the page loads."""
        if name not in files:
            raise Refusal(Code.OUTPUT_NOT_FOUND)
        return _answer(name, {})

    def _answer(name: str, headers: dict[str, str]) -> Response:
        return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=_HEADERS | headers)

    return router


def _policy(parts: Parts) -> str:
    """Return the Content-Security-Policy: the page may load its own files and outputs of the store."""
    # Only the S3 client knows the host of its URLs, so sign one to see it.
    url = urlsplit(parts.store.url("page", parts.settings.base_url))
    outputs = f"'self' {url.scheme}://{url.netloc}"
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            f"img-src blob: {outputs}",
            f"media-src {outputs}",
            f"connect-src {outputs}",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
