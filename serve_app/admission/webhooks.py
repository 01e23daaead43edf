"""Checks the webhook of a request: the service must be able to sign it, and its URL must be allowed."""

from __future__ import annotations

import binascii
import os

from standardwebhooks import Webhook

from cluster.jobs.model import JobState, NewWebhook
from cluster.net.urls import UrlRefused, check_url, parse_hosts, parse_url
from cluster.secrets import can_seal, seal
from serve_app.settings import Settings
from serve_app.wire.refusals import Code, Refusal
from serve_app.wire.requests import WebhookItem

VARIABLE = "WEBHOOK_SECRET"

ENDS = tuple(state for state in JobState if state.terminal)
"""The states that send a message unless the request names others."""


def open_signer() -> Webhook | None:
    """Return the signer of webhooks, None without `WEBHOOK_SECRET`. Raises `ValueError` for a bad one."""
    secret = os.environ.get(VARIABLE)
    if not secret:
        return None
    try:
        size = len(binascii.a2b_base64(secret.removeprefix("whsec_"), strict_mode=True))
    except binascii.Error:
        size = 0
    # The sizes that Standard Webhooks allows.
    if not secret.startswith("whsec_") or not 24 <= size <= 64:
        raise ValueError(f"{VARIABLE} must be whsec_ followed by the base64 of 24 to 64 random bytes")
    return Webhook(secret)


def admit_webhook(item: WebhookItem | None, settings: Settings) -> NewWebhook | None:
    """Check a request's webhook; the query of its URL is stored encrypted. Raises `Refusal`."""
    if item is None:
        return None
    if open_signer() is None:
        raise Refusal(Code.WEBHOOK_SECRET_REQUIRED)
    try:
        url = parse_url(item.url)
        check_url(url, parse_hosts(settings.fetch_hosts))
    except UrlRefused as error:
        raise Refusal(Code.URL_NOT_ALLOWED, field="webhook.url", reason=str(error)) from error
    if url.query and not can_seal():
        raise Refusal(Code.SECRET_KEY_REQUIRED)
    events = tuple(map(JobState, item.events)) if item.events else ENDS
    return NewWebhook(url=str(url), events=events, secret=seal({"query": url.query}) if url.query else None)
