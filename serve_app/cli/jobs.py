"""`lora-serve jobs`: the job table for operators. It needs the environment of the gateways, and no Ray."""

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

app = typer.Typer(help="List, show, cancel, requeue and purge jobs.", no_args_is_help=True)

Ids = Annotated[list[str], typer.Argument(help="Ids of requests.", show_default=False)]


@app.command("list")
def list_jobs(
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
) -> None:
    """List jobs of all keys, newest first: id, state, attempts, model, submission, owner, error code."""
    with _queue() as queue:
        for job in queue.list(None, state=state, model=model, limit=limit):
            fields = (job.id, job.state, job.attempts, job.model, _at(job.created_at), job.tenant or "-")
            typer.echo("  ".join(map(str, (*fields, job.error_code or ""))).rstrip())


@app.command()
def show(job_id: Annotated[str, typer.Argument(help="Id of a request.", show_default=False)]) -> None:
    """Print all that the table has of a job, its history and outputs included, as JSON."""
    with _queue() as queue:
        told = asdict(_known(queue, job_id)) | {
            "outputs": queue.outputs(job_id),
            "events": [asdict(event) for event in queue.events(job_id)],
        }
    typer.echo(json.dumps(told, indent=2, ensure_ascii=False))


@app.command()
def cancel(job_ids: Ids) -> None:
    """Cancel jobs: those that wait at once, those that run within one step."""

    def one(queue: JobQueue, job_id: str) -> str:
        found = queue.cancel(job_id)
        if found is None:
            raise _Refused("there is no such job")
        job, was_live = found
        if not was_live:
            raise _Refused(f"it has ended: {job.state}")
        return "canceled" if job.state is JobState.CANCELED else "stops"

    _each(job_ids, one)


@app.command()
def requeue(job_ids: Ids) -> None:
    """Submit failed jobs once more, each as a job with an id of its own.

    What has ended stays as it ended. Tokens and queries of URLs were erased then: a job that needs them fails
    again.
    """

    def one(queue: JobQueue, job_id: str) -> str:
        job = _known(queue, job_id)
        if job.state is not JobState.FAILED:
            raise _Refused(f"it has not failed: {job.state}")
        return f"queued again as {queue.submit_again(job).id}"

    _each(job_ids, one)


@app.command()
def redeliver(job_ids: Ids) -> None:
    """Send the webhooks of ended jobs once more, with all attempts."""

    def one(queue: JobQueue, job_id: str) -> str:
        if not queue.outbox.redeliver(job_id):
            raise _Refused("there is no webhook to send")
        return "due now"

    _each(job_ids, one)


@app.command()
def purge(
    older_than_days: Annotated[float, typer.Option(min=0, help="Jobs that ended so long ago.")],
) -> None:
    """Remove ended jobs with their pictures now, as gateways do after retention_days."""
    store = open_store(Settings().outputs)
    with _queue() as queue:
        gone = sum(remove_old(queue, store, older_than_days * DAY_S))
    typer.echo(f"{gone} jobs removed")


class _Refused(Exception):
    """A job is not what a command needs."""


@contextmanager
def _queue() -> Iterator[JobQueue]:
    """Open the job table; what is wrong with it, or with a job, ends the command in one line and status 1."""
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
    """Act on each job and say what became of it; status 1 if one was refused."""
    refused = False
    with _queue() as queue:
        for job_id in job_ids:
            try:
                typer.echo(f"{job_id}  {act(queue, job_id)}")
            except _Refused as refusal:
                refused = True
                typer.echo(f"{job_id}  {refusal}", err=True)
    raise typer.Exit(1 if refused else 0)


def _known(queue: JobQueue, job_id: str) -> Job:
    job = queue.get(job_id)
    if job is None:
        raise _Refused("there is no such job")
    return job


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
