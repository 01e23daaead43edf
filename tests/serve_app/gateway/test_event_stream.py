"""`GET /v1/requests/{id}/events`: each event arrives exactly once, from any gateway."""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.jobs.model import Claim, JobState, Phase, Progress
from serve_app.background.job_changes import Follower
from serve_app.gateway import event_stream as events
from tests.serve_app.conftest import Service, body, running
from tests.support.service import wait_until

Event = tuple[str, Any]


class Stream:
    """The events of one stream, in order; `last` is the id of the newest, `comments` counts the comments."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.last = ""
        self.comments = 0
        self._lines = answer.iter_lines()

    def __iter__(self) -> Iterator[Event]:
        event: dict[str, str] = {}
        for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            elif line:
                name, _, value = line.partition(": ")
                event[name] = value
            elif "data" in event:
                self.last = event["id"]
                yield event["event"], json.loads(event["data"])
                event = {}
            else:
                event = {}

    def next(self) -> Event:
        return next(iter(self))

    def until(self, state: str) -> list[Event]:
        """Return all events up to the one with this state."""
        received = []
        for name, data in self:
            received.append((name, data))
            if data.get("status") == state:
                return received
        raise AssertionError(f"the stream ended before {state}: {received}")


@contextmanager
def follow(client: httpx.Client, job_id: str, last: str | None = None, **headers: str) -> Iterator[Stream]:
    if last is not None:
        headers["Last-Event-ID"] = last
    with client.stream("GET", f"/v1/requests/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield Stream(answer)


def states(received: list[Event]) -> list[str]:
    return [data["status"] for name, data in received if name == "state"]


def report(service: Service, claim: Claim, step: int, phase: Phase = Phase.STEP) -> dict[str, Any]:
    """Write progress as a worker does; return the resulting event's data."""
    progress = Progress(prompt=0, prompts=1, step=step, steps=25, phase=phase)
    service.queue.heartbeat(claim, progress, renew=True)
    return {"prompt": 0, "prompts": 1, "step": step, "steps": 25, "phase": phase}


def test_a_jobs_life(fresh: Service) -> None:
    first, second = fresh.submit(), fresh.submit()
    with follow(fresh.client, second) as stream:
        name, queued = stream.next()
        assert (name, queued["status"], queued["error"]) == ("state", "in_queue", None)
        assert queued["at"] >= fresh.status(second)["created_at"]
        assert stream.next() == ("queue", {"queue_position": 1})
        fresh.client.delete(f"/v1/requests/{first}")
        assert stream.next() == ("queue", {"queue_position": 0})
        claim = fresh.claim(second)
        assert states([stream.next()]) == ["in_progress"]
        for step in (1, 2):
            done = report(fresh, claim, step)
            assert stream.next() == ("progress", done)
        fresh.publish(claim)
        assert states(list(stream)) == ["succeeded"]


def test_a_failure_is_told_with_its_reason(fresh: Service) -> None:
    claim = fresh.claim(fresh.submit())
    with follow(fresh.client, claim.job.id) as stream:
        stream.until("in_progress")
        fresh.queue.finish(claim, JobState.FAILED, error="It broke.", error_code="LORA_NO_MATCH")
        ((name, end),) = list(stream)
    assert name == "state"
    assert (end["status"], end["error"], end["error_code"]) == ("failed", "It broke.", "LORA_NO_MATCH")


def test_another_gateway_goes_on_where_one_stopped(fresh: Service) -> None:
    claim = fresh.claim(fresh.submit())
    report(fresh, claim, 3)
    with follow(fresh.client, claim.job.id) as stream:
        assert states(stream.until("in_progress")) == ["in_queue", "in_progress"]
        in_progress = stream.last
        name, _ = stream.next()
        assert name == "progress"
        at_step_3 = stream.last
    with running(fresh.settings) as other:
        with follow(other, claim.job.id, in_progress) as stream:
            assert stream.next()[1]["step"] == 3
        with follow(other, claim.job.id, at_step_3) as stream:
            report(fresh, claim, 4)
            assert stream.next()[1]["step"] == 4
            fresh.publish(claim)
            assert states(list(stream)) == ["succeeded"]


def test_nothing_that_happened_meanwhile_is_left_out(fresh: Service) -> None:
    job_id = fresh.submit()
    with follow(fresh.client, job_id) as stream:
        stream.next()
        last = stream.last
    fresh.queue.retry(fresh.claim(job_id), error="away", error_code="OUTPUT_STORE_ERROR", delay_s=0)
    fresh.publish(fresh.claim(job_id))
    with follow(fresh.client, job_id, last) as stream:
        assert states(list(stream)) == ["in_progress", "in_queue", "in_progress", "succeeded"]


def test_a_client_that_knows_the_end_is_told_to_stay_away(fresh: Service) -> None:
    job_id = fresh.submit()
    fresh.client.delete(f"/v1/requests/{job_id}")
    with follow(fresh.client, job_id) as stream:
        assert states(list(stream)) == ["in_queue", "canceled"]
    answer = fresh.client.get(f"/v1/requests/{job_id}/events", headers={"Last-Event-ID": stream.last})
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("last", ["x", "-1", "1 2", "1.A", "9" * 30, "1.<b>", "1." + "a" * 100])
def test_what_is_no_event_id_is_refused(service: Service, last: str) -> None:
    job_id = service.submit(body(model="sd15"))
    answer = service.client.get(f"/v1/requests/{job_id}/events", headers={"Last-Event-ID": last})
    assert answer.status_code == 400
    assert answer.json()["detail"]["error"]["code"] == "EVENT_ID_INVALID"


def test_a_silent_stream_beats_and_ends_in_time(fresh: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SILENCE_S", 0.2)
    monkeypatch.setattr(events, "LONGEST_S", 1.5)
    job_id = fresh.submit()
    begun = time.monotonic()
    with follow(fresh.client, job_id) as stream:
        assert states(list(stream)) == ["in_queue"]
    assert stream.comments >= 3
    assert time.monotonic() - begun >= 1.5


def test_streams_hold_no_threads_and_leave_nothing_behind(fresh: Service) -> None:
    """Open more streams than the process has threads; their clients just disconnect."""
    ids = [fresh.submit() for _ in range(30)]
    before = threading.active_count()
    clients = [httpx.Client(base_url=fresh.client.base_url, timeout=60) for _ in range(3)]
    with ThreadPoolExecutor(1) as other:
        streams = []
        for client in clients:
            for job_id in ids:
                answer = client.send(
                    client.build_request("GET", f"/v1/requests/{job_id}/events"), stream=True
                )
                streams.append(Stream(answer))
                streams[-1].next()
        assert followers() == 90
        # Only the pool that reads the table adds threads.
        assert threading.active_count() - before < 15
        assert other.submit(fresh.submit).result(timeout=20)
        for stream in streams:
            stream.answer.close()
    wait_until(lambda: followers() == 0, 20, "the end of all streams")
    for client in clients:
        client.close()


def test_the_program_in_the_documentation(fresh: Service) -> None:
    text = (Path(__file__).parents[3] / "docs" / "clients.md").read_text()
    (program,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "def follow(" in block)
    scope: dict[str, Any] = {}
    exec(program, scope)
    claim = fresh.claim(fresh.submit())
    stream = scope["follow"](fresh.client, claim.job.id)
    assert states([next(stream), next(stream)]) == ["in_queue", "in_progress"]
    fresh.publish(claim)
    assert states(list(stream)) == ["succeeded"]


def followers() -> int:
    return sum(isinstance(thing, Follower) for thing in gc.get_objects())
