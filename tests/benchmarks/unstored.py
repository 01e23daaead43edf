"""A gateway without the insert: measures the cost of the routes without the commit of a job."""

# No postponed annotations here: Ray reads a builder's annotation to validate its arguments.
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve import Application

from cluster.jobs.model import Job, JobState, NewJob
from serve_app.settings import GatewayArgs

if TYPE_CHECKING:
    from fastapi import FastAPI


def build_unstored(args: GatewayArgs) -> Application:
    """Build the gateway like `serve_app.build_gateway`, but without storing jobs."""

    def app() -> "FastAPI":
        from serve_app.gateway.app import create_app

        return without_insert(create_app(args))

    deployment: Any = serve.deployment(serve.ingress(app)())
    return deployment.options(name="gateway").bind()


def without_insert(app: "FastAPI") -> "FastAPI":
    """Make `app` answer submissions with jobs that are not stored."""
    opened = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: "FastAPI") -> AsyncIterator[Any]:
        async with opened(app) as state:
            app.state.parts.queue.submit_soon = _submit_soon
            yield state

    app.router.lifespan_context = lifespan
    return app


def _submit_soon(new: Sequence[NewJob]) -> Future[list[Job]]:
    stored: Future[list[Job]] = Future()
    stored.set_result([_job(job) for job in new])
    return stored


def _job(job: NewJob) -> Job:
    return Job(
        id=job.id,
        seq=0,
        model=job.model,
        spec=job.spec,
        adapter=job.adapter,
        tenant=job.tenant,
        fingerprint=job.fingerprint,
        batch=job.batch,
        state=JobState.IN_QUEUE,
        epoch=0,
        attempts=0,
        owner=None,
        created_at=time.time(),
        started_at=None,
        finished_at=None,
        cancel_requested=False,
        progress=None,
        error=None,
        error_code=None,
        result=None,
    )
