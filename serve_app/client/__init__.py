"""Python clients of the service: `LoraServe` blocks, `AsyncLoraServe` is for asyncio.

Both run the operations of `serve_app.client.core`. Importing them loads neither torch nor Ray. Errors are
`LoraServeError`: `Refused` if the service refuses a request, `Unreachable` if no answer comes.
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
    """A blocking client; threads may share it.

    `api_key` is sent to `base_url` only. Transient failures (no connection, a restart of the gateway, 429,
    503) are retried for `patience_s` seconds. `mounts` are those of `httpx.Client`: custom transports for
    some URLs; `map` does not use them. Raises `ValueError` for an invalid address or key.
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
        """Store a request and return at once. Retries never make a second job.

        Without `idempotency_key` each call makes a new job. The reference server does not support idempotency
        keys: after a lost connection or a 503 the request is not repeated, but the error is raised.
        """
        return self._run(self._core.submit(request, idempotency_key))

    def status(self, request_id: str) -> Status:
        """Return the current status of a job."""
        return self._run(self._core.status(request_id))

    def wait(
        self, request_id: str, *, timeout_s: float | None = None, on_status: OnStatus | None = None
    ) -> Status:
        """Wait until a job has ended, whether it succeeded or not, and return its last status.

        Raises `WaitTimeout` after `timeout_s` seconds. Meanwhile `on_status` is called with the current
        status about once per second.
        """
        return self._run(self._core.wait(request_id, timeout_s, on_status))

    def result(self, request_id: str) -> Result:
        """Return the result of a job; its `outputs` are None until the job has succeeded."""
        return self._run(self._core.result(request_id))

    def download(self, output: Output, path: Path | str) -> Path:
        """Download a picture or video to the file `path`, completely or not at all, and return `path`.

        Raises `DownloadFailed` if there is no way to get the file, or if its sha256 is not the one in the
        result.
        """
        return self._run(self._core.download(output, Path(path)))

    def cancel(self, request_id: str) -> Status:
        """Cancel a job. A queued job ends at once, a running one within one step.

        Raises `Refused` if the job has already succeeded or failed.
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
        """Submit a request, wait for its job, and return the outputs in the order of the prompts.

        Pictures are returned as Pillow images. Videos are saved as `folder/REQUEST_ID-INDEX.FORMAT`, and
        their paths are returned. Raises `JobFailed` if the job does not succeed, and `WaitTimeout` after
        `timeout_s` seconds.
        """
        return self._run(self._core.generate(request, Path(folder), timeout_s, on_status))

    def map(
        self, requests: Iterable[Request], *, concurrency: int = 8, progress: bool = True
    ) -> list[Result | LoraServeError]:
        """Render many requests, at most `concurrency` at a time, with a progress bar.

        Returns the result or the error of each request, in the order of `requests`.
        """

        async def in_loop() -> list[Result | LoraServeError]:
            async with AsyncLoraServe.sharing(self._core) as client:
                return await client.render_all(listed, concurrency, advance)

        listed = list(requests)
        # The event loop needs its own thread: in a notebook, this one already runs a loop.
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
        """Call any other route and return its JSON, with the same retries and errors.

        `key` is the `Idempotency-Key`. Without it, a POST is not repeated if the server may have acted on it.
        `wait_s` is how many seconds the server is asked to wait; the read timeout grows by it.
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
