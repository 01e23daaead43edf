"""What the routes of one gateway process share, from its start to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from standardwebhooks import Webhook

from cluster.connect import open_queue
from cluster.database import jobs_url
from cluster.objects import ObjectStore, open_store
from cluster.queue import JobQueue
from serve_app.backlog import Backlog
from serve_app.inspection import Inspector
from serve_app.janitor import DAY_S, Janitor
from serve_app.settings import GatewayArgs
from serve_app.waiting import Waiting
from serve_app.webhooks import Sender

THREADS = 8
"""Requests that are admitted, or read the job table, at a time; those that wait for a commit or for a job's
end hold none. As many as a process has connections: more would fail when a turn for one takes too long."""

PICTURE_THREADS = 2
"""Requests with control images that are admitted at a time: a decoded image takes up to 100 MB."""

INSPECTIONS = 4
"""LoRAs that are inspected at a time: one from elsewhere keeps a thread for up to 20 s."""

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Parts:
    """What the routes share. `pictures` are threads that may decode images, `inspections` fetch headers."""

    settings: GatewayArgs
    queue: JobQueue
    store: ObjectStore
    waiting: Waiting
    backlog: Backlog
    threads: Executor
    pictures: Executor
    inspector: Inspector
    inspections: Executor

    async def run(self, call: Callable[[], Returned], threads: Executor | None = None) -> Returned:
        """Run what blocks on one of `threads`, else of the common ones.

        Not by anyio: its threads last as long as the event loop's first task, which under Ray Serve is a
        request, so that each request would start one.
        """
        return await asyncio.get_running_loop().run_in_executor(threads or self.threads, call)


@asynccontextmanager
async def open_parts(settings: GatewayArgs, signer: Webhook | None) -> AsyncIterator[Parts]:
    """Open the stores, waiting for the job table if need be, and run janitor, long polls and webhooks."""
    with ExitStack() as stack:
        store = await asyncio.to_thread(open_store, settings.outputs)
        opened = partial(open_queue, jobs_url(settings.jobs), run_timeout_s=settings.inference_timeout_s)
        queue = stack.enter_context(closing(await asyncio.to_thread(opened)))
        stack.enter_context(closing(Janitor(queue, store, settings.retention_days * DAY_S)))
        if signer is not None:
            stack.enter_context(closing(Sender(queue.outbox, signer, settings)))
        yield Parts(
            settings=settings,
            queue=queue,
            store=store,
            waiting=stack.enter_context(closing(Waiting(queue))),
            backlog=Backlog(queue, settings),
            threads=stack.enter_context(ThreadPoolExecutor(THREADS, "gateway")),
            pictures=stack.enter_context(ThreadPoolExecutor(PICTURE_THREADS, "pictures")),
            inspector=Inspector(settings),
            inspections=stack.enter_context(ThreadPoolExecutor(INSPECTIONS, "inspections")),
        )


async def _parts(request: Request) -> Parts:
    return request.app.state.parts


Shared = Annotated[Parts, Depends(_parts)]
"""The parts of the gateway that a route belongs to."""
