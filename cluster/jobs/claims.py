"""Chooses the next job of a replica, and records which replicas are alive and which adapters they hold."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum, auto
from functools import lru_cache
from typing import Any, TypeAlias

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    and_,
    delete,
    exists,
    func,
    select,
    true,
)

from cluster.databases.database import Insert
from cluster.jobs.model import Job, JobState
from cluster.jobs.schema import job_outputs, jobs, now, warm, workers
from cluster.jobs.transitions import job_of

_MAX_LEFT = 16
"""Maximum adapters that a claim may pass over; each costs a walk along the queue. After that the claim tries
at most half as many that the replica already holds."""

_queued = jobs.alias("queued")


class Answer(Enum):
    """A replica's reply to an offered job."""

    TAKE = auto()
    BRING = auto()
    """Not yet: the replica is fetching the job's adapter, which already counts as held."""
    LEAVE = auto()


Offer: TypeAlias = Callable[[Job, str | None], Answer]
"""Decides on a job, given its secret. Runs in the claim's transaction: must not block or use the table."""


def take_any(_job: Job, _secret: str | None) -> Answer:
    """Accept any job."""
    return Answer.TAKE


def anything_ready(model: str) -> ColumnElement[bool]:
    """Match if the model has a queued job that is not in back-off."""
    return exists().where(_ready(_queued, model))


def choose(
    connection: Connection, model: str, owner: str, offer: Offer, *, age_bound_s: float, patience_s: float
) -> tuple[int | None, set[str]]:
    """Offer jobs in the order of `next_job` until one is taken.

    Returns the `seq` of that job, None if there is none, and the adapters that the replica is fetching. After
    a refusal no other job with that adapter is offered, because it would be refused too. Adapters that
    `owner` holds are tried even past the limit of refusals, so ready jobs never wait for a download.
    """
    passed: frozenset[str] = frozenset()
    coming: set[str] = set()
    for turn in range(_MAX_LEFT * 3 // 2):
        if turn < _MAX_LEFT:
            chosen = next_job(model, owner, age_bound_s=age_bound_s, patience_s=patience_s, without=passed)
        else:
            chosen = _next_held(model, owner, passed)
        row = connection.execute(select(jobs).where(jobs.c.seq == chosen)).mappings().one_or_none()
        if row is None:
            break
        answer = offer(job_of(row), row["secret"])
        if answer is Answer.TAKE:
            return row["seq"], coming
        if answer is Answer.BRING:
            coming.add(row["adapter"])
        passed |= {row["adapter"]}
    return None, coming


def peek_next(
    connection: Connection,
    model: str,
    owner: str,
    *,
    age_bound_s: float,
    patience_s: float,
    without: frozenset[str],
) -> tuple[Job, str | None] | None:
    """Return the job that `owner` would claim now and its secret, None if it has not waited `patience_s`."""
    chosen = next_job(model, owner, age_bound_s=age_bound_s, patience_s=patience_s, without=without)
    waited = jobs.c.created_at <= now() - patience_s
    row = connection.execute(select(jobs).where(jobs.c.seq == chosen, waited)).mappings().one_or_none()
    return None if row is None else (job_of(row), row["secret"])


@lru_cache
def next_job(
    model: str,
    owner: str,
    *,
    age_bound_s: float,
    patience_s: float,
    without: frozenset[str] = frozenset(),
) -> ColumnElement[int]:
    """Return the `seq` of the job that `owner` should claim now, NULL if none, as an SQL expression.

    A replica takes:

    1. the oldest job that has waited `age_bound_s`, so that no job starves;
    2. the oldest job whose LoRA it holds;
    3. the oldest job whose LoRA no replica holds;
    4. the oldest job that has waited `patience_s` for a replica with its LoRA (delay scheduling).

    Each class is evaluated only if those before it are empty, and walks one index, oldest job first. Skips
    jobs locked by another claim, and jobs whose adapter is in `without`.
    """
    # Cached, because building the expression takes as long as a claim.
    others = _queued.c.adapter.not_in(without) if without else true()
    return func.coalesce(
        _oldest(model, others, _queued.c.created_at <= now() - age_bound_s),
        _oldest_of(model, _held_adapter_of_oldest(model, owner, without)),
        _oldest(model, others, ~_held_by_a_replica()),
        _oldest(model, others, _queued.c.created_at <= now() - patience_s),
    )


@lru_cache
def _next_held(model: str, owner: str, without: frozenset[str]) -> ColumnElement[int]:
    """Return the `seq` of the oldest job whose LoRA `owner` holds, NULL if none."""
    return _oldest_of(model, _held_adapter_of_oldest(model, owner, without))


def announce(
    connection: Connection, insert: Insert, owner: str, model: str, adapters: Collection[str]
) -> None:
    """Record that the replica is alive and holds exactly these adapters."""
    present = {"model": model, "seen_at": now()}
    row = insert(workers).values(owner=owner, **present)
    # The row's lock also serializes announcements by several threads of a replica.
    connection.execute(row.on_conflict_do_update(index_elements=[workers.c.owner], set_=present))
    known = set(connection.scalars(select(warm.c.adapter).where(warm.c.owner == owner)))
    gone, new = known.difference(adapters), set(adapters) - known
    if gone:
        connection.execute(delete(warm).where(warm.c.owner == owner, warm.c.adapter.in_(gone)))
    if new:
        connection.execute(insert(warm), [{"owner": owner, "adapter": adapter} for adapter in new])


def record_held(connection: Connection, insert: Insert, owner: str, adapters: Collection[str]) -> None:
    """Record that the replica will also hold these adapters. It must have been announced before."""
    rows = [{"owner": owner, "adapter": adapter} for adapter in adapters]
    if rows:
        connection.execute(insert(warm).values(rows).on_conflict_do_nothing())


def secret_and_done(connection: Connection, job_id: str) -> tuple[str | None, frozenset[int]]:
    """Return the job's secret and the indexes of prompts with a recorded output."""
    both = select(jobs.c.secret, job_outputs.c.prompt_index).outerjoin(job_outputs).where(jobs.c.id == job_id)
    rows = connection.execute(both).all()
    return rows[0][0], frozenset(index for _, index in rows if index is not None)


def adapters_running(connection: Connection, owner: str) -> set[str]:
    """Return the adapters of the replica's running jobs. They are loaded or about to be."""
    running = and_(jobs.c.state == JobState.IN_PROGRESS, jobs.c.owner == owner)
    return set(connection.scalars(select(jobs.c.adapter).where(running)))


def _ready(table: FromClause, model: str) -> ColumnElement[bool]:
    return and_(table.c.state == JobState.IN_QUEUE, table.c.model == model, table.c.not_before <= now())


def _oldest(model: str, *conditions: ColumnElement[bool]) -> ColumnElement[int]:
    return _first(select(_queued.c.seq).where(_ready(_queued, model), *conditions), _queued.c.created_at)


def _oldest_of(model: str, adapter: ColumnElement[str]) -> ColumnElement[int]:
    chosen = select(_queued.c.seq).where(_ready(_queued, model), _is(_queued.c.adapter, adapter))
    return _first(chosen, _queued.c.adapter, _queued.c.created_at)


def _is(column: ColumnElement[str], value: ColumnElement[str]) -> ColumnElement[bool]:
    """Match equality, written as a range to make PostgreSQL use `jobs_by_adapter`.

    With a range, only that index has the order "adapter, created_at". After a plain comparison PostgreSQL
    drops the adapter from the order. Without statistics it may then walk `jobs_by_age` through the jobs of
    all other adapters: 32 ms instead of 0.4 ms with 20,000 jobs.
    """
    return column.between(value, value)


def _first(ready: Select[Any], *order: ColumnElement[Any]) -> ColumnElement[int]:
    first = ready.order_by(*order, _queued.c.seq).limit(1)
    return first.with_for_update(skip_locked=True).scalar_subquery()


def _held_adapter_of_oldest(model: str, owner: str, without: frozenset[str]) -> ColumnElement[str]:
    """Return the adapter with the oldest queued job among those that `owner` holds, except `without`.

    Probes the index once per adapter held. An IN list would sort all their jobs instead.
    """
    head = jobs.alias("head")
    ready = and_(_ready(head, model), _is(head.c.adapter, warm.c.adapter))
    first = select(head.c.created_at).where(ready).order_by(head.c.adapter, head.c.created_at).limit(1)
    since = first.correlate(warm).scalar_subquery()
    mine = and_(warm.c.owner == owner, warm.c.adapter.not_in(without) if without else true())
    held = select(warm.c.adapter).where(mine).order_by(since.nulls_last()).limit(1)
    # A CTE, because the expression is used twice but must be evaluated only once.
    return select(held.cte("held").c.adapter).scalar_subquery()


def _held_by_a_replica() -> ColumnElement[bool]:
    same = and_(warm.c.adapter == _queued.c.adapter, workers.c.model == _queued.c.model)
    return exists().where(warm.c.owner == workers.c.owner, same)
