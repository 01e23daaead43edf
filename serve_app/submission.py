"""One request becomes one row, once per idempotency key."""

from __future__ import annotations

import uuid

from cluster.jobs import IdempotencyConflict, Job, NewJob
from cluster.objects import ObjectStore
from cluster.queue import JobQueue
from serve_app.admission import admit
from serve_app.errors import Code, Refusal
from serve_app.schemas import InferenceRequest
from serve_app.settings import Settings

MAX_KEY_CHARS = 255

_TENANT = ""
"""The owner of every job while the service is open."""


def check_key(key: str | None) -> None:
    """Raise `Refusal` unless `key` is absent, or 1 to 255 printable ASCII characters."""
    if key is not None and not (1 <= len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise Refusal(Code.IDEMPOTENCY_KEY_INVALID)


def submit(
    request: InferenceRequest, key: str | None, settings: Settings, queue: JobQueue, store: ObjectStore
) -> Job:
    """Admit and store a request; the job is on disk when this returns.

    A key that was used with the same body answers with the earlier job, whatever became of the files that
    body names. Blocking. Raises `Refusal`, `StoreUnavailable` and `StoreError`.
    """
    fingerprint = None
    if key is not None:
        fingerprint = request.fingerprint
        earlier = queue.find(_TENANT, key)
        if earlier is not None:
            if earlier.fingerprint != fingerprint:
                raise Refusal(Code.IDEMPOTENCY_KEY_REUSED)
            return earlier
    spec = admit(request, settings, store)
    job = NewJob(
        id=str(uuid.uuid4()),
        model=spec.model,
        spec=spec.model_dump(mode="json"),
        adapter=spec.adapter,
        tenant=_TENANT,
        idempotency_key=key,
        fingerprint=fingerprint,
    )
    try:
        return queue.submit([job])[0]
    except IdempotencyConflict:
        raise Refusal(Code.IDEMPOTENCY_KEY_REUSED) from None
