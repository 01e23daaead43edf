"""One request becomes one row, once per idempotency key."""

from __future__ import annotations

import uuid

from cluster.jobs import IdempotencyConflict, Job, NewJob
from cluster.objects import ObjectStore
from cluster.queue import JobQueue
from cluster.secrets import seal
from deployments.render import split_secrets
from serve_app.admission import admit
from serve_app.auth import OPEN_TENANT
from serve_app.errors import Code, Refusal
from serve_app.schemas import InferenceRequest
from serve_app.settings import GatewayArgs
from serve_app.webhooks import admit_webhook

MAX_KEY_CHARS = 255


def check_key(key: str | None) -> None:
    """Raise `Refusal` unless `key` is absent, or 1 to 255 printable ASCII characters."""
    if key is not None and not (1 <= len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        raise Refusal(Code.IDEMPOTENCY_KEY_INVALID)


def submit(
    request: InferenceRequest,
    key: str | None,
    tenant: str,
    settings: GatewayArgs,
    queue: JobQueue,
    store: ObjectStore,
) -> Job:
    """Admit and store a request of `tenant`; the job is on disk when this returns.

    An idempotency key that was used with the same body answers with the earlier job, whatever became of the
    files that body names, and however many jobs are waiting. Blocking. Raises `Refusal`, `StoreUnavailable`
    and `StoreError`.
    """
    # Before the look for a twin: one that is stored in between, and fills the queue, is found.
    full = _queue_is_full(tenant, settings, queue)
    fingerprint = None
    if key is not None:
        fingerprint = request.fingerprint
        earlier = queue.find(tenant, key)
        if earlier is not None:
            if earlier.fingerprint != fingerprint:
                raise Refusal(Code.IDEMPOTENCY_KEY_REUSED)
            return earlier
    if full is not None:
        raise full
    webhook = admit_webhook(request.webhook, settings)
    spec, queries = split_secrets(admit(request, settings, store))
    secrets = {name: value for name, value in (("hf_token", request.hf_token), ("queries", queries)) if value}
    job = NewJob(
        id=str(uuid.uuid4()),
        model=spec.model,
        spec=spec.model_dump(mode="json"),
        adapter=spec.adapter,
        tenant=tenant,
        idempotency_key=key,
        fingerprint=fingerprint,
        secret=seal(secrets) if secrets else None,
        webhook=webhook,
    )
    try:
        return queue.submit([job])[0]
    except IdempotencyConflict:
        raise Refusal(Code.IDEMPOTENCY_KEY_REUSED) from None


def _queue_is_full(tenant: str, settings: GatewayArgs, queue: JobQueue) -> Refusal | None:
    """Return the refusal of one more job, None while there is room; an open service has no key to bound."""
    queued, own = queue.waiting(tenant)
    if queued >= settings.max_queued:
        return Refusal(Code.TOO_MANY_QUEUED, bound="max_queued", most=settings.max_queued)
    if tenant != OPEN_TENANT and own >= settings.max_queued_per_key:
        return Refusal(Code.TOO_MANY_QUEUED, bound="max_queued_per_key", most=settings.max_queued_per_key)
    return None
