"""The outbox of webhooks: one row per job with a webhook, due from the job's end until it is delivered.

A row becomes due in the transaction that ends its job (`cluster.jobs.transitions`), so no message is lost.
It stays due until its delivery is recorded, so a receiver may get a message more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, func, select, update

from cluster.databases.database import Database
from cluster.jobs.model import Job
from cluster.jobs.schema import job_events, jobs, now, webhooks
from cluster.jobs.transitions import job_of
from cluster.telemetry import redact

HOLD_S = 60.0
"""How long a message is reserved for one gateway. Longer than an attempt may take."""

DELAYS_S = (5.0, 60.0, 300.0, 1800.0, 7200.0, 14_400.0, 28_800.0, 34_200.0)
"""Pauses between attempts, about a day in total. After the last attempt the message waits for `redeliver`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message to `url` that a job has ended. `secret` is the URL's query, encrypted.

    `sequence` is the id of the job's last event. Of two messages about one job, the higher is the newer.
    """

    job: Job
    sequence: int
    url: str
    attempts: int
    secret: str | None = field(default=None, repr=False)


class Outbox:
    """The messages in a job table, shared by the threads of a process. Raises `StoreUnavailable`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, limit: int) -> Sequence[Message]:
        """Return at most `limit` due messages and reserve them for the caller for `HOLD_S` seconds.

        This counts as an attempt. Unless `delivered` or `refused` is called, they are due again after that.
        """
        with self._database.read() as connection:
            # Idle gateways poll often and must not queue for the write lock.
            if (
                connection.scalar(select(webhooks.c.job_id).where(webhooks.c.due_at <= now()).limit(1))
                is None
            ):
                return []
        due = select(webhooks.c.job_id).where(webhooks.c.due_at <= now()).order_by(webhooks.c.due_at)
        chosen = due.limit(limit).with_for_update(skip_locked=True)
        with self._database.write() as connection:
            ids = list(connection.scalars(chosen))
            held = {"due_at": now() + HOLD_S, "attempts": webhooks.c.attempts + 1}
            connection.execute(update(webhooks).where(webhooks.c.job_id.in_(ids)).values(held))
            return _messages(connection, ids)

    def delivered(self, message: Message) -> None:
        """Record that the receiver accepted the message."""
        self._set(message, due_at=None, delivered_at=now(), error=None)

    def refused(self, message: Message, error: str) -> None:
        """Record why an attempt failed, and schedule the next attempt if there is one left."""
        left = DELAYS_S[message.attempts - 1 : message.attempts]
        self._set(message, due_at=now() + left[0] if left else None, error=redact(error))

    def redeliver(self, job_id: str) -> bool:
        """Make the message of an ended job due now and reset its attempts. False if it has no message."""
        ended = select(jobs.c.id).where(
            jobs.c.finished_at.is_not(None), webhooks.c.events.contains(jobs.c.state)
        )
        again = update(webhooks).where(webhooks.c.job_id == job_id, webhooks.c.job_id.in_(ended))
        with self._database.write() as connection:
            return bool(connection.execute(again.values(due_at=now(), attempts=0)).rowcount)

    def _set(self, message: Message, **values: object) -> None:
        with self._database.write() as connection:
            connection.execute(update(webhooks).where(webhooks.c.job_id == message.job.id).values(values))


def _messages(connection: Connection, ids: Sequence[str]) -> list[Message]:
    last = select(func.max(job_events.c.id)).where(job_events.c.job_id == jobs.c.id).scalar_subquery()
    columns = [webhooks.c[name] for name in ("url", "secret", "attempts")]
    wanted = select(jobs, last.label("sequence"), *(column.label(f"w_{column.name}") for column in columns))
    rows = connection.execute(wanted.join(webhooks).where(jobs.c.id.in_(ids))).mappings()
    return [
        Message(
            job=job_of(row),
            sequence=row["sequence"],
            url=row["w_url"],
            attempts=row["w_attempts"],
            secret=row["w_secret"],
        )
        for row in rows
    ]
