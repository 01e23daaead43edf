"""`lora-serve jobs`: the job table for operators. Needs the gateways' environment variables, but not Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from cluster.databases.database import jobs_url
from cluster.failures import StoreUnavailable
from cluster.jobs.model import Job, JobState
from cluster.jobs.queue import JobQueue
from cluster.objects.opening import open_store
from cluster.objects.store import StoreError
from serve_app.background.janitor import DAY_S, remove_old
from serve_app.settings import Settings

app = typer.Typer(help="List, show, cancel, requeue, redeliver and purge jobs.", no_args_is_help=True)

Ids = Annotated[list[str], typer.Argument(help="Ids of requests.", show_default=False)]


@app.command("list")
def list_jobs(
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many jobs.")] = 50,
) -> None:
    """List jobs of all keys, newest first: id, state, attempts, model, submission time, owner, error code."""
    with _queue() as queue:
        for job in queue.list(None, state=state, model=model, limit=limit):
            fields = (job.id, job.state, job.attempts, job.model, _at(job.created_at), job.tenant or "-")
            typer.echo("  ".join(map(str, (*fields, job.error_code or ""))).rstrip())


@app.command()
def show(job_id: Annotated[str, typer.Argument(help="Id of a request.", show_default=False)]) -> None:
    """Print everything that is stored about a job as JSON, including its events and outputs."""
    with _queue() as queue:
        row = asdict(_get(queue, job_id)) | {
            "outputs": queue.outputs(job_id),
            "events": [asdict(event) for event in queue.events(job_id)],
        }
    typer.echo(json.dumps(row, indent=2, ensure_ascii=False))


@app.command()
def cancel(job_ids: Ids) -> None:
    """Cancel jobs. Queued ones end at once, running ones within one step."""

    def one(queue: JobQueue, job_id: str) -> str:
        found = queue.cancel(job_id)
        if found is None:
            raise _Refused("no such job")
        job, was_live = found
        if not was_live:
            raise _Refused(f"it has already ended: {job.state}")
        return "canceled" if job.state is JobState.CANCELED else "stopping"

    _each(job_ids, one)


@app.command()
def requeue(job_ids: Ids) -> None:
    """Submit failed jobs again, each as a new job with its own id.

    The failed job stays as it is. Its tokens and URL queries were erased when it ended, so a job that needs
    them fails again.
    """

    def one(queue: JobQueue, job_id: str) -> str:
        job = _get(queue, job_id)
        if job.state is not JobState.FAILED:
            raise _Refused(f"only failed jobs can be requeued, this one is {job.state}")
        return f"queued again as {queue.submit_again(job).id}"

    _each(job_ids, one)


@app.command()
def redeliver(job_ids: Ids) -> None:
    """Send the webhooks of ended jobs again, with the full number of attempts."""

    def one(queue: JobQueue, job_id: str) -> str:
        if not queue.outbox.redeliver(job_id):
            raise _Refused("it has no webhook to send")
        return "webhook queued"

    _each(job_ids, one)


@app.command()
def purge(
    older_than_days: Annotated[
        float, typer.Option(min=0, help="Remove jobs that ended more than this many days ago.")
    ],
) -> None:
    """Remove ended jobs and their outputs now. Gateways do the same after retention_days."""
    store = open_store(Settings().outputs)
    with _queue() as queue:
        gone = sum(remove_old(queue, store, older_than_days * DAY_S))
    typer.echo(f"{gone} jobs removed")


class _Refused(Exception):
    """The command cannot act on this job."""


@contextmanager
def _queue() -> Iterator[JobQueue]:
    """Open the job table; an error prints one line and exits with status 1."""
    try:
        queue = JobQueue(jobs_url(Settings().jobs))
        try:
            yield queue
        finally:
            queue.close()
    except (StoreUnavailable, StoreError, _Refused) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _each(job_ids: list[str], act: Callable[[JobQueue, str], str]) -> None:
    """Act on each job and print the result; exit with status 1 if one was refused."""
    refused = False
    with _queue() as queue:
        for job_id in job_ids:
            try:
                typer.echo(f"{job_id}  {act(queue, job_id)}")
            except _Refused as refusal:
                refused = True
                typer.echo(f"{job_id}  {refusal}", err=True)
    raise typer.Exit(1 if refused else 0)


def _get(queue: JobQueue, job_id: str) -> Job:
    job = queue.get(job_id)
    if job is None:
        raise _Refused("no such job")
    return job


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
