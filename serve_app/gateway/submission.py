"""Stores one request as one job; an idempotency key makes only one job."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

from fastapi import Header

from cluster.jobs.model import IdempotencyConflict, Job, NewJob
from serve_app.admission.admit import keep_images
from serve_app.admission.new_job import new_job
from serve_app.gateway.shared import Parts
from serve_app.wire.refusals import Code, Refusal
from serve_app.wire.requests import InferenceRequest

MAX_KEY_CHARS = 255

IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Requests with the same key and body make only one job.",
        json_schema_extra={"minLength": 1, "maxLength": MAX_KEY_CHARS, "pattern": "^[ -~]+$"},
    ),
]
"""The header, as a parameter of a route; `check_key` checks it."""


def check_key(key: str | None) -> None:
    """Raise `Refusal` unless `key` is absent, or 1 to 255 printable ASCII characters."""
    if key is not None and not (1 <= len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise Refusal(Code.IDEMPOTENCY_KEY_INVALID)


async def submit(request: InferenceRequest, key: str | None, tenant: str, parts: Parts) -> Job:
    """Admit and store a request of `tenant`. The job is on disk when this returns.

    If the idempotency key was used with the same body, this returns the earlier job, even if the files that
    the body names are gone or the queue is full. Raises `Refusal`, `StoreUnavailable` and `StoreError`.
    """
    threads = parts.pictures if request.has_images else parts.threads
    admitted = await parts.run(partial(_admit, request, key, tenant, parts), threads)
    if isinstance(admitted, Job):
        return admitted
    try:
        (job,) = await asyncio.wrap_future(parts.queue.submit_soon([admitted]))
    except IdempotencyConflict:
        raise Refusal(Code.IDEMPOTENCY_KEY_REUSED) from None
    return job


def _admit(request: InferenceRequest, key: str | None, tenant: str, parts: Parts) -> NewJob | Job:
    """Return the job to store, or the earlier job of the same key."""
    # Counted before the search by key. Otherwise a repeat whose first job is stored in between and fills the
    # queue would be refused.
    full = parts.backlog.enter(tenant)
    fingerprint = None
    if key is not None:
        fingerprint = request.fingerprint
        earlier = parts.queue.find(tenant, key)
        if earlier is not None:
            if earlier.fingerprint != fingerprint:
                raise Refusal(Code.IDEMPOTENCY_KEY_REUSED)
            return earlier
    if full is not None:
        raise full
    job, images = new_job(
        request, parts.settings, tenant=tenant, idempotency_key=key, fingerprint=fingerprint
    )
    keep_images(images, parts.store)
    return job
