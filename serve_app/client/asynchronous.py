"""The asyncio client; see `serve_app.client`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from serve_app.client.answers import Model, Output, Result, Status, Submitted
from serve_app.client.core import Core, OnStatus
from serve_app.client.errors import LoraServeError
from serve_app.client.sending import LIMITS, PATIENCE_S, Operation, Reply, Request, Send, Step

T = TypeVar("T")


class AsyncLoraServe:
    """A client for one asyncio event loop, with the methods of `LoraServe`."""

    def __init__(self, base_url: str, api_key: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        self._core = Core(base_url, api_key, patience_s)
        self._http = httpx.AsyncClient(limits=LIMITS)

    @classmethod
    def sharing(cls, core: Core) -> Self:
        """Return a client with the address, key and patience of another one."""
        client = cls.__new__(cls)
        client._core, client._http = core, httpx.AsyncClient(limits=LIMITS)
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(self, request: Request, *, idempotency_key: str | None = None) -> Submitted:
        """Like `LoraServe.submit`."""
        return await self._run(self._core.submit(request, idempotency_key))

    async def status(self, request_id: str) -> Status:
        """Like `LoraServe.status`."""
        return await self._run(self._core.status(request_id))

    async def wait(
        self, request_id: str, *, timeout_s: float | None = None, on_status: OnStatus | None = None
    ) -> Status:
        """Like `LoraServe.wait`."""
        return await self._run(self._core.wait(request_id, timeout_s, on_status))

    async def result(self, request_id: str) -> Result:
        """Like `LoraServe.result`."""
        return await self._run(self._core.result(request_id))

    async def download(self, output: Output, path: Path | str) -> Path:
        """Like `LoraServe.download`."""
        return await self._run(self._core.download(output, Path(path)))

    async def cancel(self, request_id: str) -> Status:
        """Like `LoraServe.cancel`."""
        return await self._run(self._core.cancel(request_id))

    async def models(self) -> list[Model]:
        """Like `LoraServe.models`."""
        return await self._run(self._core.models())

    async def generate(
        self,
        request: Request,
        folder: Path | str = ".",
        *,
        timeout_s: float | None = None,
        on_status: OnStatus | None = None,
    ) -> list[Image.Image | Path]:
        """Like `LoraServe.generate`."""
        return await self._run(self._core.generate(request, Path(folder), timeout_s, on_status))

    async def map(
        self, requests: Iterable[Request], *, concurrency: int = 8, progress: bool = True
    ) -> list[Result | LoraServeError]:
        """Like `LoraServe.map`."""
        listed = list(requests)
        with progress_bar(len(listed), shown=progress) as advance:
            return await self.render_all(listed, concurrency, advance)

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: Request | None = None,
        query: Mapping[str, str] | None = None,
        key: str | None = None,
        wait_s: float = 0.0,
    ) -> Any:  # noqa: ANN401 - any JSON
        """Like `LoraServe.send`."""
        return await self._run(self._core.send(method, path, body=body, query=query, key=key, wait_s=wait_s))

    async def render_all(
        self, requests: Sequence[Request], concurrency: int, advance: Callable[[], object]
    ) -> list[Result | LoraServeError]:
        """Render like `map`; call `advance` whenever a request ends."""
        if concurrency < 1:
            raise ValueError("concurrency must be at least 1")
        found: dict[int, Result | LoraServeError] = {}
        waiting = iter(enumerate(requests))

        async def work() -> None:
            for index, request in waiting:
                try:
                    found[index] = await self._run(self._core.render(request))
                except LoraServeError as error:
                    found[index] = error
                advance()

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        return [found[index] for index in range(len(requests))]

    async def _run(self, operation: Operation[T]) -> T:
        with closing(operation):
            reply: Reply = None
            while True:
                try:
                    step = operation.send(reply)
                except StopIteration as end:
                    return end.value
                reply = await self._do(step)

    async def _do(self, step: Step) -> Reply:
        if not isinstance(step, Send):
            await asyncio.sleep(step.seconds)
            return None
        try:
            async with self._http.stream(step.method, step.url, **step.options) as response:
                if step.into is None or response.status_code != 200:
                    await response.aread()
                else:
                    step.into.begin()
                    async for piece in response.aiter_bytes():
                        step.into.write(piece)
            return response
        except httpx.RequestError as error:
            return error


@contextmanager
def progress_bar(total: int, *, shown: bool) -> Iterator[Callable[[], object]]:
    """Show a progress bar until the block ends; yield a function that advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not shown) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)
