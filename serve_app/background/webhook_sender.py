"""Sends webhooks from the outbox when jobs have ended, signed for their receivers; every gateway does.

Signatures are those of Standard Webhooks (https://www.standardwebhooks.com), with the service's one secret.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

from standardwebhooks import Webhook

from cluster.failures import JobFailure, StoreUnavailable
from cluster.jobs.webhook_outbox import Message, Outbox
from cluster.net.fetcher import Fetcher
from cluster.net.limits import FetchError, Limits
from cluster.net.urls import parse_hosts, parse_url
from cluster.secrets import open_secret
from serve_app.settings import Settings
from serve_app.wire.answers import StatusAnswer

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""Pause between two looks into the outbox, in seconds."""

SENDERS = 8
"""Messages that one gateway sends at a time."""

LIMITS = Limits(total_s=20.0, grace_s=10.0)
"""A receiver answers within 10 s; an attempt ends long before another gateway tries the same message."""


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
