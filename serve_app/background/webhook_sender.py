"""Sends signed webhooks from the outbox when jobs end. Every gateway does this.

Signatures follow Standard Webhooks (https://www.standardwebhooks.com), with the one secret of the service.
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
"""Pause between two reads of the outbox, in seconds."""

SENDERS = 8
"""Messages that one gateway sends in parallel."""

LIMITS = Limits(total_s=20.0, grace_s=10.0)
"""A receiver must answer within 10 s. An attempt ends long before another gateway could take its message."""


@contextmanager
def _logged() -> Iterator[None]:
    """Log every error: if one ended a thread, no more webhooks would be sent."""
    try:
        yield
    except StoreUnavailable as error:
        logger.warning("the job table is unreachable; webhooks wait: %s", error)
    except Exception:
        logger.exception("sending webhooks failed and will be tried again")


class Sender:
    """Sends due messages on its own threads. Every gateway has one; each message is taken by one of them."""

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
        """Stop the threads once the current messages are sent."""
        self._closed = True
        self._woken.set()
        self._thread.join()
        self._senders.shutdown()

    def _run(self) -> None:
        sending: set[Future[None]] = set()
        while not self._closed:
            # A slow receiver blocks only its own sender thread.
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
            failure = str(error)
        else:
            if 200 <= status < 300:
                self._outbox.delivered(message)
                return
            failure = f"the receiver answered {status}"
        logger.warning("webhook of job %s, attempt %d: %s", message.job.id, message.attempts, failure)
        self._outbox.refused(message, failure)

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
    payload = {
        "type": f"request.{message.job.state}",
        "timestamp": status["finished_at"],
        "data": {"sequence": message.sequence, **status},
    }
    return json.dumps(payload, ensure_ascii=False)
