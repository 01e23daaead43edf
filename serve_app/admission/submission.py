"""One request becomes one row, once per idempotency key."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Annotated

from fastapi import Header

from cluster.jobs.model import IdempotencyConflict, Job, NewJob
from cluster.secrets import seal
from deployments.spec.job import split_secrets
from serve_app.admission.admit import check, keep_images
from serve_app.background.webhook_sender import admit_webhook
from serve_app.gateway.shared import Parts
from serve_app.settings import GatewayArgs
from serve_app.wire.refusals import Code, Refusal
from serve_app.wire.requests import InferenceRequest

MAX_KEY_CHARS = 255

IdempotencyKey = Annotated[
    str | None,
    Header(
        description="The same key and body make one job, however often they are sent.",
        json_schema_extra={"minLength": 1, "maxLength": MAX_KEY_CHARS, "pattern": "^[ -~]+$"},
    ),
]
"""The header, in a route; `check_key` judges it."""


def check_key(key: str | None) -> None:
    """Raise `Refusal` unless `key` is absent, or 1 to 255 printable ASCII characters."""
    if key is not None and not (1 <= len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise Refusal(Code.IDEMPOTENCY_KEY_INVALID)


async def submit(request: InferenceRequest, key: str | None, tenant: str, parts: Parts) -> Job:
    """Admit and store a request of `tenant`; the job is on disk when this returns.

    An idempotency key that was used with the same body answers with the earlier job, whatever became of the
    files that body names, and however many jobs are waiting. Raises `Refusal`, `StoreUnavailable` and
    `StoreError`.
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
    """Return the job to store, or the earlier one of the same key."""
    # Before the look for a twin: one that is stored in between, and fills the queue, is found.
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


def new_job(
    request: InferenceRequest,
    settings: GatewayArgs,
    *,
    tenant: str,
    idempotency_key: str | None,
    fingerprint: str | None,
    batch: str | None = None,
) -> tuple[NewJob, Mapping[str, bytes]]:
    """Return the job that a request becomes, and the control images to keep for it. Raises `Refusal`."""
    webhook = admit_webhook(request.webhook, settings)
    admitted, images = check(request, settings)
    spec, queries = split_secrets(admitted)
    secrets = {name: value for name, value in (("hf_token", request.hf_token), ("queries", queries)) if value}
    job = NewJob(
        id=str(uuid.uuid4()),
        model=spec.model,
        spec=spec.model_dump(mode="json"),
        adapter=spec.adapter,
        tenant=tenant,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint,
        secret=seal(secrets) if secrets else None,
        webhook=webhook,
        batch=batch,
    )
    return job, images
