"""State that the routes of one gateway process share while it runs."""

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

from cluster.databases.database import jobs_url
from cluster.jobs.opening import open_queue
from cluster.jobs.queue import JobQueue
from cluster.objects.opening import open_store
from cluster.objects.store import ObjectStore
from serve_app.admission.backlog import Backlog
from serve_app.admission.inspection import Inspector
from serve_app.background.janitor import DAY_S, Janitor
from serve_app.background.long_polls import Waiting
from serve_app.background.webhook_sender import Sender
from serve_app.settings import GatewayArgs
from serve_app.wire.answers import ResultAnswer, StatusAnswer

THREADS = 8
"""Threads that admit requests and read the job table. Requests that wait for a commit or for the end of a job
hold no thread. Equal to the connection pool of a process: further threads would only time out."""

PICTURE_THREADS = 2
"""Threads that admit requests with control images: a decoded image takes up to 100 MB."""

INSPECTIONS = 4
"""Threads that inspect LoRAs: a remote LoRA holds a thread for up to 20 s."""

Returned = TypeVar("Returned")

Answer = TypeVar("Answer", StatusAnswer, ResultAnswer)


@dataclass(frozen=True)
class Parts:
    """What the routes share. `pictures` are threads that decode images; `inspections` fetch LoRA headers."""

    settings: GatewayArgs
    queue: JobQueue
    store: ObjectStore
    waiting: Waiting
    backlog: Backlog
    threads: Executor
    pictures: Executor
    inspector: Inspector
    inspections: Executor

    async def when_ended(self, read: Callable[[], Answer], job_id: str, wait_s: float) -> Answer:
        """Read now. If the job has not ended, read again when it ends or after `wait_s` seconds.

        Holds no thread while it waits.
        """
        if not wait_s:
            return await self.run(read)
        with self.waiting.end_of(job_id) as end:
            answer = await self.run(read)
            if answer.status.terminal:
                return answer
            await end.wait(wait_s)
            return await self.run(read)

    async def run(self, call: Callable[[], Returned], threads: Executor | None = None) -> Returned:
        """Run a blocking call on one of `threads`, by default the common ones.

        This does not use anyio: its threads live as long as the event loop's root task. Under Ray Serve that
        is a request, so each request would start a new thread.
        """
        return await asyncio.get_running_loop().run_in_executor(threads or self.threads, call)


@asynccontextmanager
async def open_parts(settings: GatewayArgs, signer: Webhook | None) -> AsyncIterator[Parts]:
    """Open the stores, wait for the job table if needed, and run the janitor, long polls and webhooks."""
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
"""The shared parts, as a parameter of a route."""
