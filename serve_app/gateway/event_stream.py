"""Server-sent events of one job: https://html.spec.whatwg.org/multipage/server-sent-events.html.

An event's id is the number of the job's last change in `job_events`; for progress and queue positions, the
reported values follow. So any gateway can continue from any id, even if the gateway that sent it is gone.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Send

from cluster.jobs.model import JobState
from serve_app.background.job_changes import Following, View
from serve_app.wire.answers import ProgressAnswer
from serve_app.wire.refusals import Code, Refusal

LONGEST_S = 60.0
"""Longest stream; then the client reconnects. A gateway that is shut down lets its streams run this long."""

SILENCE_S = 15.0
"""Longest time without an event or comment, in seconds: proxies cut connections idle for a minute."""

RETRY_MS = 1000

START = "0"
"""The id before the first event."""

_SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": ["state", "queue", "progress"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
"""JSON schema of each event."""

DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events. `data` is JSON",
        "content": {"text/event-stream": {"schema": _SCHEMA}},
    },
    204: {"description": "The job has ended and `Last-Event-ID` was its last event"},
}
"""The responses of the route, for /openapi.json."""

_ID = re.compile(r"[0-9]{1,18}(\.[a-z0-9.]{1,60})?")


class StateEvent(BaseModel):
    """Data of `state`: the job entered this state. `error` and `error_code` are set if it failed."""

    status: JobState
    at: datetime
    error: str | None
    error_code: str | None


class QueueEvent(BaseModel):
    """Data of `queue`: approximately how many jobs of the model are ahead."""

    queue_position: int


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `data` is a `StateEvent`, `QueueEvent` or `ProgressAnswer`."""

    id: str
    name: str
    data: BaseModel

    def __str__(self) -> str:
        """Return the event in wire format."""
        return f"id: {self.id}\nevent: {self.name}\ndata: {self.data.model_dump_json()}\n\n"


def check_event_id(last: str | None) -> str:
    """Return the id to continue after. Raises `Refusal` if `last` is not an event id."""
    if not last:
        return START
    if not _ID.fullmatch(last):
        raise Refusal(Code.EVENT_ID_INVALID)
    return last


def events_since(view: View, seen: str) -> Iterator[Event]:
    """Yield the events after the one with the id `seen`: all state changes, then the current progress."""
    number = int(seen.partition(".")[0])
    for change in view.history:
        if change.id > number:
            failed = change.state is JobState.FAILED
            yield Event(
                str(change.id),
                "state",
                StateEvent(
                    status=change.state,
                    at=datetime.fromtimestamp(change.at, UTC),
                    error=view.job.error if failed else None,
                    error_code=view.job.error_code if failed else None,
                ),
            )
    now = _now(view)
    if now is not None and now.id != seen and view.last >= number:
        yield now


def _now(view: View) -> Event | None:
    """Return the queue position or progress of a job, None if it has neither."""
    if view.job.state is JobState.IN_QUEUE and view.place is not None:
        return Event(f"{view.last}.{view.place}", "queue", QueueEvent(queue_position=view.place))
    if view.job.state is JobState.IN_PROGRESS and view.job.progress is not None:
        done = view.job.progress
        data = ProgressAnswer.model_validate(done, from_attributes=True)
        return Event(f"{view.last}.{done.prompt}.{done.phase}.{done.step}", "progress", data)
    return None


class EventStream(StreamingResponse):
    """Streams the events of a job from `view` on, to a client whose last event is `seen`.

    Ends after the final state, or after `LONGEST_S`.
    """

    media_type = "text/event-stream"

    def __init__(self, following: Following, view: View, seen: str) -> None:
        self._events = _stream(following, view, seen)
        # Otherwise nginx buffers the stream.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._events, headers=headers)

    async def stream_response(self, send: Send) -> None:
        """Send all events. If the client disconnects, stop following the job at once."""
        async with aclosing(self._events):
            await super().stream_response(send)


async def _stream(following: Following, view: View, seen: str) -> AsyncGenerator[str, Any]:
    clock = asyncio.get_running_loop().time
    end = clock() + LONGEST_S
    yield f"retry: {RETRY_MS}\n\n"
    with following.of(view.job.id) as follower:
        while True:
            for event in events_since(view, seen):
                seen = event.id
                yield str(event)
            if view.job.state.terminal:
                return
            newer = None
            while newer is None:
                left = end - clock()
                if left <= 0:
                    return
                newer = await follower.next(min(SILENCE_S, left))
                if newer is None:
                    yield ": keep-alive\n\n"
            view = newer
