"""Webhooks: checked when a request comes, sent by every gateway when its job has ended, signed for receivers.

Signatures are those of Standard Webhooks (https://www.standardwebhooks.com), with the service's one secret.
"""

from __future__ import annotations

import binascii
import json
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

from standardwebhooks import Webhook

from cluster.failures import JobFailure, StoreUnavailable
from cluster.jobs.model import JobState, NewWebhook
from cluster.jobs.webhook_outbox import Message, Outbox
from cluster.net.fetcher import Fetcher
from cluster.net.limits import FetchError, Limits
from cluster.net.urls import UrlRefused, check_url, parse_hosts, parse_url
from cluster.secrets import can_seal, open_secret, seal
from serve_app.settings import Settings
from serve_app.wire.answers import StatusAnswer
from serve_app.wire.refusals import Code, Refusal
from serve_app.wire.requests import WebhookItem

logger = logging.getLogger(__name__)

VARIABLE = "WEBHOOK_SECRET"

LOOK_S = 1.0
"""Pause between two looks into the outbox, in seconds."""

SENDERS = 8
"""Messages that one gateway sends at a time."""

ENDS = tuple(state for state in JobState if state.terminal)
"""What a webhook tells of unless the request says otherwise."""

LIMITS = Limits(total_s=20.0, grace_s=10.0)
"""A receiver answers within 10 s; an attempt ends long before another gateway tries the same message."""


def open_signer() -> Webhook | None:
    """Return what signs messages, None without `WEBHOOK_SECRET`; raises `ValueError` for a bad one."""
    secret = os.environ.get(VARIABLE)
    if not secret:
        return None
    try:
        size = len(binascii.a2b_base64(secret.removeprefix("whsec_"), strict_mode=True))
    except binascii.Error:
        size = 0
    # The sizes that Standard Webhooks allows.
    if not secret.startswith("whsec_") or not 24 <= size <= 64:
        raise ValueError(f"{VARIABLE} must be whsec_ and the base64 of 24 to 64 random bytes")
    return Webhook(secret)


def admit_webhook(item: WebhookItem | None, settings: Settings) -> NewWebhook | None:
    """Check where a request wants to be told; its query is kept encrypted. Raises `Refusal`."""
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


@contextmanager
def _logged() -> Iterator[None]:
    """Log whatever it is: if the threads ended of it, nobody would be told any more."""
    try:
        yield
    except StoreUnavailable as error:
        logger.warning("the job table is away; webhooks wait: %s", error)
    except Exception:
        logger.exception("webhooks failed; the next look comes")


class Sender:
    """Sends what is due, on threads of its own; every gateway has one, and a message goes to one of them."""

    def __init__(self, outbox: Outbox, signer: Webhook, settings: Settings) -> None:
        self._outbox = outbox
        self._signer = signer
        self._fetcher = Fetcher(parse_hosts(settings.fetch_hosts), LIMITS)
        self._closed = False
        self._woken = threading.Event()
        self._senders = ThreadPoolExecutor(SENDERS, thread_name_prefix="webhook")
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the threads after what they are sending."""
        self._closed = True
        self._woken.set()
        self._thread.join()
        self._senders.shutdown()

    def _run(self) -> None:
        sending: set[Future[None]] = set()
        while not self._closed:
            # A slow receiver keeps one sender, not those beside it.
            sending = {each for each in sending if not each.done()}
            if free := SENDERS - len(sending):
                with _logged():
                    sending |= {self._begin(message) for message in self._outbox.take(free)}
            self._woken.wait(LOOK_S)
            self._woken.clear()

    def _begin(self, message: Message) -> Future[None]:
        sent = self._senders.submit(self._send, message)
        sent.add_done_callback(lambda _: self._woken.set())
        return sent

    @_logged()
    def _send(self, message: Message) -> None:
        try:
            status = self._post(message)
        except (FetchError, JobFailure, OSError) as error:
            refusal = str(error)
        else:
            if 200 <= status < 300:
                self._outbox.delivered(message)
                return
            refusal = f"the receiver answered {status}"
        logger.warning("webhook of job %s, attempt %d: %s", message.job.id, message.attempts, refusal)
        self._outbox.refused(message, refusal)

    def _post(self, message: Message) -> int:
        query = open_secret(message.secret)["query"] if message.secret else ""
        url = parse_url(f"{message.url}?{query}" if query else message.url)
        name, sent_at, body = f"{message.job.id}.{message.sequence}", datetime.now(UTC), _body(message)
        headers = {
            "webhook-id": name,
            "webhook-timestamp": str(int(sent_at.timestamp())),
            "webhook-signature": self._signer.sign(name, sent_at, body),
        }
        return self._fetcher.post(url, body.encode(), headers)


def _body(message: Message) -> str:
    status = StatusAnswer.of(message.job, None).model_dump(mode="json")
    told = {
        "type": f"request.{message.job.state}",
        "timestamp": status["finished_at"],
        "data": {"sequence": message.sequence, **status},
    }
    return json.dumps(told, ensure_ascii=False)
