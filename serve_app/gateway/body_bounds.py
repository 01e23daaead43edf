"""Reads request bodies: limits their size while they stream in, and parses them as strict, limited JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from serve_app.wire.refusals import Code, Refusal

MAX_JSON_VALUES = 250_000
"""Maximum number of values in a body. Commas in strings count too: 100 long prompts may have 100,000."""


class BoundedRequest(Request):
    """A request whose body has at most `app.state.max_body_bytes` bytes and `MAX_JSON_VALUES` values.

    The body is parsed on the event loop: parsing holds the GIL, so threads are no help. Control images, the
    only large values, cost 0.6 ms per MB; the limit on values keeps the rest below 0.1 s.
    """

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the body in pieces. Raises `Refusal` as soon as it is too large."""
        most, size = self.app.state.max_body_bytes, 0
        async for piece in super().stream():
            size += len(piece)
            if size > most:
                raise Refusal(Code.BODY_TOO_LARGE, max_bytes=most)
            yield piece

    async def json(self) -> Any:  # noqa: ANN401 - any JSON
        """Return the parsed body. Rejects NaN, lone surrogates and nesting deeper than 200.

        Raises `json.JSONDecodeError`, which FastAPI answers with 422.
        """
        # The body is not kept: a request that then waits for its job would keep its images in memory.
        body = b"".join([piece async for piece in self.stream() if piece])
        # Each value except the first follows a comma or an opening bracket.
        if sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
            raise Refusal(Code.BODY_TOO_LARGE, max_values=MAX_JSON_VALUES)
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class BoundedRoute(APIRoute):
    """A route that reads its body as a `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, wrapped to get a `BoundedRequest`."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return handle
