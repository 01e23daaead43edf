"""Reads pages of one tenant's jobs, newest first."""

from __future__ import annotations

import base64
import re

from cluster.jobs.model import JobState
from cluster.jobs.queue import JobQueue
from deployments.catalog import CATALOG
from serve_app.wire.answers import ListAnswer, ListedAnswer
from serve_app.wire.refusals import Code, Refusal

MAX_LIMIT = 200

_CURSOR = re.compile(r"[A-Za-z0-9_-]{11}")
"""Base64 of the 8 bytes of a `seq`."""


def read_page(
    queue: JobQueue,
    tenant: str,
    state: JobState | None,
    model: str | None,
    batch: str | None,
    limit: int,
    cursor: str | None,
) -> ListAnswer:
    """Return the `limit` newest jobs of `tenant` after `cursor`, filtered by state, model and batch if given.

    A page continues where the previous one ended, even if new jobs were submitted meanwhile. Blocking. Raises
    `Refusal` and `StoreUnavailable`.
    """
    if model is not None and model not in CATALOG:
        raise Refusal(Code.MODEL_NOT_FOUND, supported_models=list(CATALOG))
    before = None if cursor is None else decode_cursor(cursor)
    # One more than wanted, to see if there is another page.
    found = queue.list(tenant, state=state, model=model, batch=batch, limit=limit + 1, before=before)
    page = found[:limit]
    return ListAnswer(
        requests=[ListedAnswer.listed(job) for job in page],
        next_cursor=encode_cursor(page[-1].seq) if len(found) > limit else None,
    )


def encode_cursor(seq: int) -> str:
    """Return a job's `seq` as a cursor that is opaque to clients."""
    return base64.urlsafe_b64encode(seq.to_bytes(8, signed=True)).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    """Return the `seq` in a cursor of `encode_cursor`. Raises `Refusal` for anything else."""
    if _CURSOR.fullmatch(cursor):
        seq = int.from_bytes(base64.urlsafe_b64decode(f"{cursor}="), signed=True)
        if seq > 0:
            return seq
    raise Refusal(Code.CURSOR_INVALID)
