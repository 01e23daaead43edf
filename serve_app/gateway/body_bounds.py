"""How request bodies are read: bounded while they stream in, and parsed as strict JSON of bounded size."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from serve_app.wire.refusals import Code, Refusal

MAX_JSON_VALUES = 250_000
"""Most values in a body; commas in texts count as well, perhaps 100,000 in 100 long prompts."""


class BoundedRequest(Request):
    """A request whose body has at most `app.state.max_body_bytes` bytes and `MAX_JSON_VALUES` values.

    The body is parsed where it is read: parsing holds the interpreter, in a thread as well. Control images,
    the only large thing in a body, cost 0.6 ms per MB; the bound on values keeps everything else below 0.1 s.
    """

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the body in pieces; raises `Refusal` as soon as it is too large."""
        most, size = self.app.state.max_body_bytes, 0
        async for piece in super().stream():
            size += len(piece)
            if size > most:
                raise Refusal(Code.BODY_TOO_LARGE, max_bytes=most)
            yield piece

    async def json(self) -> Any:  # noqa: ANN401 - any JSON
        """Return the parsed body; NaN, lone surrogates and nesting deeper than 200 are no JSON here.

        Raises `json.JSONDecodeError`, which FastAPI answers with 422.
        """
        # Not kept: who waits for a job's end after this must not hold its pictures.
        body = b"".join([piece async for piece in self.stream() if piece])
        # Each value but the first follows a comma or an opening bracket.
        if sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
            raise Refusal(Code.BODY_TOO_LARGE, max_values=MAX_JSON_VALUES)
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class BoundedRoute(APIRoute):
    """A route that reads its body as a `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, called with the bounded request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return handle
