"""Which job a replica gets next, and what the table knows of replicas: who is there, and what each holds."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    and_,
    delete,
    exists,
    func,
    insert,
    select,
    update,
)

from cluster.jobs import JobState
from cluster.schema import jobs, now, warm, workers

_queued = jobs.alias("queued")


def anything_ready(model: str) -> ColumnElement[bool]:
    """Match if a job of the model waits and is not in back-off."""
    return exists().where(_ready(_queued, model))


@lru_cache
def next_job(model: str, owner: str, *, age_bound_s: float, patience_s: float) -> ColumnElement[int]:
    """Return the `seq` of the job that `owner` has to claim now, NULL if there is none, as an SQL expression.

    In this order: the oldest job that has waited `age_bound_s`, so that none starves; the oldest whose LoRA
    this replica holds; the oldest whose LoRA no replica holds; the oldest that has waited `patience_s` in
    vain for one that holds its LoRA (delay scheduling). Each class is evaluated only if those before it are
    empty, and walks one index from its oldest job on. Jobs that another transaction is about to claim are
    passed over.
    """
    # Cached: building the expression takes as long as a claim.
    return func.coalesce(
        _oldest(model, _queued.c.created_at <= now() - age_bound_s),
        _oldest(model, _queued.c.adapter == _held_adapter_of_oldest(model, owner)),
        _oldest(model, ~_held_by_a_replica()),
        _oldest(model, _queued.c.created_at <= now() - patience_s),
    )


def announce(connection: Connection, owner: str, model: str, adapters: Collection[str]) -> None:
    """Record that the replica is alive now and holds exactly these adapters."""
    present = update(workers).where(workers.c.owner == owner).values(model=model, seen_at=now())
    # The row's lock also orders announcements of one replica by several threads.
    if not connection.execute(present).rowcount:
        connection.execute(insert(workers).values(owner=owner, model=model, seen_at=now()))
    known = set(connection.scalars(select(warm.c.adapter).where(warm.c.owner == owner)))
    gone, new = known.difference(adapters), set(adapters) - known
    if gone:
        connection.execute(delete(warm).where(warm.c.owner == owner, warm.c.adapter.in_(gone)))
    if new:
        connection.execute(insert(warm), [{"owner": owner, "adapter": adapter} for adapter in new])


def adapters_running(connection: Connection, owner: str) -> set[str]:
    """Return the adapters of the jobs that the replica runs: loaded, or about to be."""
    running = and_(jobs.c.state == JobState.IN_PROGRESS, jobs.c.owner == owner)
    return set(connection.scalars(select(jobs.c.adapter).where(running)))


def _ready(table: FromClause, model: str) -> ColumnElement[bool]:
    return and_(table.c.state == JobState.IN_QUEUE, table.c.model == model, table.c.not_before <= now())


def _oldest(model: str, condition: ColumnElement[bool]) -> ColumnElement[int]:
    chosen = select(_queued.c.seq).where(_ready(_queued, model), condition)
    first = chosen.order_by(_queued.c.created_at, _queued.c.seq).limit(1)
    return first.with_for_update(skip_locked=True).scalar_subquery()


def _held_adapter_of_oldest(model: str, owner: str) -> ColumnElement[str]:
    """Of the adapters that `owner` holds, the one whose first job in the queue is the oldest.

    One probe of the index for each adapter held: an IN list would sort all their jobs.
    """
    head = jobs.alias("head")
    since = select(func.min(head.c.created_at)).where(_ready(head, model), head.c.adapter == warm.c.adapter)
    held = select(warm.c.adapter).where(warm.c.owner == owner)
    return held.order_by(since.correlate(warm).scalar_subquery().nulls_last()).limit(1).scalar_subquery()


def _held_by_a_replica() -> ColumnElement[bool]:
    same = and_(warm.c.adapter == _queued.c.adapter, workers.c.model == _queued.c.model)
    return exists().where(warm.c.owner == workers.c.owner, same)
