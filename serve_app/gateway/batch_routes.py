"""The routes of batches: store thousands of requests in few transactions, read results in few reads."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response

from cluster.jobs.model import IdempotencyConflict, Job, JobState
from serve_app.admission.admit import keep_images
from serve_app.admission.new_job import new_job
from serve_app.gateway.auth import KeyedRoute, Tenant
from serve_app.gateway.listing import MAX_LIMIT, decode_cursor, encode_cursor
from serve_app.gateway.shared import Parts, Shared
from serve_app.gateway.submission import IdempotencyKey, check_key
from serve_app.wire.answers import Outputs
from serve_app.wire.batch_answers import (
    BatchAnswer,
    BatchResult,
    BatchResultsAnswer,
    BatchRetryAnswer,
    BatchSubmitAnswer,
)
from serve_app.wire.openapi_errors import documented
from serve_app.wire.refusals import Code, Refusal
from serve_app.wire.requests import MAX_ITEMS, UUID, BatchRequest

MOST_ERRORS = 20
"""Refused requests that one response lists."""

_SEPARATOR = "\x1f"
"""Separates a batch's key from the index of a request. A client's key cannot contain it."""

_ID = re.compile(UUID)

_OF_A_BATCH = documented(Code.BATCH_NOT_FOUND, Code.STORE_UNAVAILABLE)

batches = APIRouter(prefix="/v1/batches", route_class=KeyedRoute)


async def _batch_id(
    batch_id: Annotated[str, Path(description="Id of the batch", json_schema_extra={"format": "uuid"})],
) -> str:
    """Reject malformed ids early; PostgreSQL refuses some strings."""
    if not _ID.fullmatch(batch_id):
        raise Refusal(Code.BATCH_NOT_FOUND, batch_id=batch_id)
    return batch_id


BatchId = Annotated[str, Depends(_batch_id)]


@batches.post(
    "",
    responses=documented(
        Code.IDEMPOTENCY_KEY_INVALID,
        Code.IDEMPOTENCY_KEY_REUSED,
        Code.BATCH_REFUSED,
        Code.BATCH_TOO_LARGE,
        Code.BODY_TOO_LARGE,
        Code.TOO_MANY_QUEUED,
        Code.STORE_UNAVAILABLE,
    ),
)
async def submit_batch(
    body: BatchRequest,
    tenant: Tenant,
    parts: Shared,
    idempotency_key: IdempotencyKey = None,
) -> BatchSubmitAnswer:
    """Store requests, all of them or none. More calls with the same `batch_id` add to the batch."""
    check_key(idempotency_key)
    pictures = any(request.has_images for request in body.requests)
    # Derived from the key, so that a repeat of the call gets the same id without a read.
    generated = uuid.uuid4() if idempotency_key is None else uuid.uuid5(uuid.NAMESPACE_OID, idempotency_key)
    batch_id = body.batch_id or str(generated)
    threads = parts.pictures if pictures else parts.threads
    jobs = await parts.run(partial(_store, body, batch_id, idempotency_key, tenant, parts), threads)
    if isinstance(jobs, Future):
        try:
            jobs = await asyncio.wrap_future(jobs)
        except IdempotencyConflict:
            raise Refusal(Code.IDEMPOTENCY_KEY_REUSED) from None
    return BatchSubmitAnswer(
        batch_id=batch_id,
        batch_url=f"{parts.settings.base_url}/v1/batches/{batch_id}",
        request_ids=[job.id for job in jobs],
        warnings=[
            f"requests[{index}]: {text}" for index, job in enumerate(jobs) for text in job.spec["warnings"]
        ],
    )


@batches.get("/{batch_id}", responses=_OF_A_BATCH)
async def read_batch(batch_id: BatchId, tenant: Tenant, parts: Shared) -> BatchAnswer:
    """Return how many requests of a batch are in each state."""
    return await parts.run(lambda: BatchAnswer.of(batch_id, _counts(batch_id, tenant, parts)))


@batches.get("/{batch_id}/results", responses=documented(Code.CURSOR_INVALID) | _OF_A_BATCH)
async def read_results(
    batch_id: BatchId,
    tenant: Tenant,
    parts: Shared,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Maximum number of requests per page")] = 100,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the previous page")] = None,
) -> BatchResultsAnswer:
    """List the requests of a batch in the order of submission, with LoRAs, prompts and results."""
    after = 0 if cursor is None else decode_cursor(cursor)
    return await parts.run(partial(_results, batch_id, tenant, parts, limit, after))


@batches.post(
    "/{batch_id}/retry", responses=documented(Code.BATCH_TOO_LARGE, Code.TOO_MANY_QUEUED) | _OF_A_BATCH
)
async def retry_batch(
    batch_id: BatchId,
    tenant: Tenant,
    parts: Shared,
    limit: Annotated[int, Query(ge=1, le=MAX_ITEMS, description="Resubmit at most this many.")] = MAX_ITEMS,
) -> BatchRetryAnswer:
    """Resubmit the failed requests of a batch as new requests that replace them, oldest first."""
    return await parts.run(partial(_retry, batch_id, tenant, parts, limit))


@batches.delete(
    "/{batch_id}",
    responses=_OF_A_BATCH
    | {202: {"model": BatchAnswer, "description": "Running requests stop within one step"}},
)
async def cancel_batch(batch_id: BatchId, tenant: Tenant, parts: Shared, response: Response) -> BatchAnswer:
    """Cancel the requests of a batch that have not ended. Running ones stop within one step (202)."""
    answer = await parts.run(partial(_cancel, batch_id, tenant, parts))
    if answer.counts.in_progress:
        response.status_code = 202
    return answer


def _store(
    body: BatchRequest, batch_id: str, key: str | None, tenant: str, parts: Parts
) -> Future[list[Job]] | list[Job]:
    """Admit all requests and start to store them, or return the earlier jobs of the key. Raises `Refusal`."""
    # Counted before the search by key, as for a single request.
    full = parts.backlog.enter(tenant, len(body.requests))
    keys: Sequence[str | None] = [None] * len(body.requests)
    fingerprint = None
    if key is not None:
        # Of the whole body, so that no other call can repeat only a part of this one.
        fingerprint = body.fingerprint
        own = [f"{key}{_SEPARATOR}{index}" for index in range(len(body.requests))]
        stored = parts.queue.batches.stored(tenant, own)
        if any(job.fingerprint != fingerprint for job in stored):
            raise Refusal(Code.IDEMPOTENCY_KEY_REUSED)
        if len(stored) == len(own):
            return stored
        keys = own
    if full is not None:
        raise full
    new, images, errors = [], {}, []
    for index, (request, own_key) in enumerate(zip(body.requests, keys, strict=True)):
        names = {"tenant": tenant, "idempotency_key": own_key, "fingerprint": fingerprint, "batch": batch_id}
        try:
            job, needed = new_job(request, parts.settings, **names)
        except Refusal as refusal:
            error = {"code": refusal.code, "message": refusal.message, "details": refusal.details}
            errors.append({"index": index, **error})
        else:
            new.append(job)
            images.update(needed)
    if errors:
        raise Refusal(Code.BATCH_REFUSED, refused=len(errors), errors=errors[:MOST_ERRORS])
    keep_images(images, parts.store)
    return parts.queue.submit_soon(new)


def _counts(batch_id: str, tenant: str, parts: Parts) -> Mapping[JobState, int]:
    """Return the counts of a batch of `tenant`. Another tenant's batch is refused as if it did not exist."""
    counts = parts.queue.batches.counts(tenant, batch_id)
    if not any(counts.values()):
        raise Refusal(Code.BATCH_NOT_FOUND, batch_id=batch_id)
    return counts


def _results(batch_id: str, tenant: str, parts: Parts, limit: int, after: int) -> BatchResultsAnswer:
    # One more than wanted, to see if there is another page.
    found = parts.queue.batches.page(tenant, batch_id, after=after, limit=limit + 1)
    if not found and not after:
        raise Refusal(Code.BATCH_NOT_FOUND, batch_id=batch_id)
    page = found[:limit]
    recorded = parts.queue.batches.outputs([job for job in page if job.state is JobState.SUCCEEDED])
    outputs = {
        job_id: Outputs.of(listed, parts.store, parts.settings.base_url)
        for job_id, listed in recorded.items()
    }
    return BatchResultsAnswer(
        results=[BatchResult.of(job, outputs.get(job.id)) for job in page],
        next_cursor=encode_cursor(page[-1].seq) if len(found) > limit else None,
    )


def _retry(batch_id: str, tenant: str, parts: Parts, limit: int) -> BatchRetryAnswer:
    again = min(limit, _counts(batch_id, tenant, parts)[JobState.FAILED])
    if again and (full := parts.backlog.enter(tenant, again)):
        raise full
    retried = parts.queue.batches.retry(tenant, batch_id, again)
    return BatchRetryAnswer.of(batch_id, _counts(batch_id, tenant, parts), retried=retried)


def _cancel(batch_id: str, tenant: str, parts: Parts) -> BatchAnswer:
    _counts(batch_id, tenant, parts)
    parts.queue.batches.cancel(tenant, batch_id)
    return BatchAnswer.of(batch_id, _counts(batch_id, tenant, parts))
