"""Builds the job table row of an admitted request."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from cluster.jobs.model import NewJob
from cluster.secrets import seal
from deployments.spec.job import split_secrets
from serve_app.admission.admit import check
from serve_app.admission.webhooks import admit_webhook
from serve_app.settings import GatewayArgs
from serve_app.wire.requests import InferenceRequest


def new_job(
    request: InferenceRequest,
    settings: GatewayArgs,
    *,
    tenant: str,
    idempotency_key: str | None,
    fingerprint: str | None,
    batch: str | None = None,
) -> tuple[NewJob, Mapping[str, bytes]]:
    """Return the job for a request, and the control images to store for it, by key. Raises `Refusal`."""
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
