"""The service from Python: `LoraServe`, which blocks, and `AsyncLoraServe`, which does not.

Both carry out the operations of `serve_app.client.core`; importing them loads neither torch nor Ray. What
goes wrong is a `LoraServeError`: `Refused` if the service refuses, `Unreachable` if no answer comes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from anyio.from_thread import start_blocking_portal
from PIL import Image

from serve_app.client.answers import Model, Output, Outputs, Progress, Result, Status, Submitted
from serve_app.client.asynchronous import AsyncLoraServe, progress_bar
from serve_app.client.core import Core, OnStatus
from serve_app.client.errors import (
    DownloadFailed,
    JobFailed,
    LoraServeError,
    Refused,
    Unreachable,
    WaitTimeout,
)
from serve_app.client.sending import LIMITS, PATIENCE_S, Operation, Reply, Request, Send, Step

__all__ = [
    "AsyncLoraServe",
    "DownloadFailed",
    "JobFailed",
    "LoraServe",
    "LoraServeError",
    "Model",
    "Output",
    "Outputs",
    "Progress",
    "Refused",
    "Request",
    "Result",
    "Status",
    "Submitted",
    "Unreachable",
    "WaitTimeout",
]

T = TypeVar("T")


class LoraServe:
    """A client that blocks; threads may share it.

    `api_key` goes to `base_url` only. Trouble that may pass (no connection, a restart of the gateway, 429,
    503) is met with further attempts for `patience_s` seconds. `mounts` are those of `httpx.Client`: other
    ways to some URLs than HTTP, for all but `map`. Raises `ValueError` for an address or a key that cannot be
    one.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        mounts: Mapping[str, httpx.BaseTransport | None] | None = None,
    ) -> None:
        self._core = Core(base_url, api_key, patience_s)
        self._http = httpx.Client(limits=LIMITS, mounts=mounts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, request: Request, *, idempotency_key: str | None = None) -> Submitted:
        """Store a request and return at once; it becomes one job, however often it had to be sent.

        Without `idempotency_key` each call makes a job of its own. A server that knows no such keys (the
        reference) is not asked twice when the connection was lost: that raises `CONNECTION_LOST`.
        """
        return self._run(self._core.submit(request, idempotency_key))

    def status(self, request_id: str) -> Status:
        """Return how a job is doing now."""
        return self._run(self._core.status(request_id))

    def wait(
        self, request_id: str, *, timeout_s: float | None = None, on_status: OnStatus | None = None
    ) -> Status:
        """Return the last status of a job once it has ended, well or not.

        Raises `WaitTimeout` after `timeout_s` seconds. `on_status` is called with each status on the way,
        about one a second.
        """
        return self._run(self._core.wait(request_id, timeout_s, on_status))

    def result(self, request_id: str) -> Result:
        """Return what a job made; its `outputs` are None until it succeeded."""
        return self._run(self._core.result(request_id))

    def download(self, output: Output, path: Path | str) -> Path:
        """Fetch a picture or video into the file `path`, whole or not at all; raise `DownloadFailed`.

        Where the result names a sha256, the file has it.
        """
        return self._run(self._core.download(output, Path(path)))

    def cancel(self, request_id: str) -> Status:
        """Cancel a job: at once while it is queued, within one step while it runs.

        Raises `Refused` if it has ended otherwise.
        """
        return self._run(self._core.cancel(request_id))

    def models(self) -> list[Model]:
        """Return the models that the service renders."""
        return self._run(self._core.models())

    def generate(
        self,
        request: Request,
        folder: Path | str = ".",
        *,
        timeout_s: float | None = None,
        on_status: OnStatus | None = None,
    ) -> list[Image.Image | Path]:
        """Submit, wait, and return what was made, in the order of the prompts.

        Pictures are returned as such; videos are written into `folder` as `REQUEST_ID-INDEX.FORMAT` and their
        paths are returned. Raises `JobFailed`, and `WaitTimeout` after `timeout_s` seconds.
        """
        return self._run(self._core.generate(request, Path(folder), timeout_s, on_status))

    def map(
        self, requests: Iterable[Request], *, concurrency: int = 8, progress: bool = True
    ) -> list[Result | LoraServeError]:
        """Render many requests, at most `concurrency` at a time, under a progress bar.

        Returns for each request in its place what it made, or the error that it ended in.
        """

        async def in_loop() -> list[Result | LoraServeError]:
            async with AsyncLoraServe.sharing(self._core) as twin:
                return await twin.render_all(listed, concurrency, advance)

        listed = list(requests)
        # The loop has a thread of its own: a notebook's already runs one in this.
        with progress_bar(len(listed), shown=progress) as advance, start_blocking_portal() as portal:
            return portal.call(in_loop)

    def send(
        self,
        method: str,
        path: str,
        *,
        body: Request | None = None,
        query: Mapping[str, str] | None = None,
        key: str | None = None,
        wait_s: float = 0.0,
    ) -> Any:  # noqa: ANN401 - any JSON
        """Return the JSON that another route answers with, with the same retries and errors.

        `key` is the `Idempotency-Key`: without one, a POST is not sent again if the server may have acted on
        it. `wait_s` is how long the server was asked to wait, in seconds.
        """
        return self._run(self._core.send(method, path, body=body, query=query, key=key, wait_s=wait_s))

    def _run(self, operation: Operation[T]) -> T:
        with closing(operation):
            reply: Reply = None
            while True:
                try:
                    step = operation.send(reply)
                except StopIteration as end:
                    return end.value
                reply = self._do(step)

    def _do(self, step: Step) -> Reply:
        if not isinstance(step, Send):
            time.sleep(step.seconds)
            return None
        try:
            with self._http.stream(step.method, step.url, **step.options) as response:
                if step.into is None or response.status_code != 200:
                    response.read()
                else:
                    step.into.begin()
                    for piece in response.iter_bytes():
                        step.into.write(piece)
            return response
        except httpx.RequestError as error:
            return error
