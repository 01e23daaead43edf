"""Server-sent events of one job: https://html.spec.whatwg.org/multipage/server-sent-events.html.

An event's id is the number of the job's last change in `job_events`, and for progress and places what the
table said then. So any gateway goes on from any id, whatever became of the one that sent it.
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
"""A stream ends then and the client comes back: a gateway that is replaced gives its streams this long."""

SILENCE_S = 15.0
"""Longest time without a comment, in seconds: proxies cut connections that are silent for a minute."""

RETRY_MS = 1000

START = "0"
"""Before the first event."""

_SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": ["state", "queue", "progress"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
"""Of each event."""

DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events; `data` is JSON",
        "content": {"text/event-stream": {"schema": _SCHEMA}},
    },
    204: {"description": "The job has ended and `Last-Event-ID` was its last event"},
}
"""The answers of the route, for its description."""

_ID = re.compile(r"[0-9]{1,18}(\.[a-z0-9.]{1,60})?")


class StateEvent(BaseModel):
    """Data of `state`: the job came into this state; error and code are there if it failed."""

    status: JobState
    at: datetime
    error: str | None
    error_code: str | None


class QueueEvent(BaseModel):
    """Data of `queue`: how many jobs of the model are ahead, approximately."""

    queue_position: int


@dataclass(frozen=True, slots=True)
class Event:
    """One event: `data` is one of `StateEvent`, `QueueEvent` and `ProgressAnswer`."""

    id: str
    name: str
    data: BaseModel

    def __str__(self) -> str:
        """As it goes over the wire."""
        return f"id: {self.id}\nevent: {self.name}\ndata: {self.data.model_dump_json()}\n\n"


def check_event_id(last: str | None) -> str:
    """Return the id to go on after; raises `Refusal` for what no event ever had as id."""
    if not last:
        return START
    if not _ID.fullmatch(last):
        raise Refusal(Code.EVENT_ID_INVALID)
    return last


def news(view: View, seen: str) -> Iterator[Event]:
    """Yield what a client does not know whose last event is `seen`: all states since, and how it is now."""
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
    """Return where a job is within its state."""
    if view.job.state is JobState.IN_QUEUE and view.place is not None:
        return Event(f"{view.last}.{view.place}", "queue", QueueEvent(queue_position=view.place))
    if view.job.state is JobState.IN_PROGRESS and view.job.progress is not None:
        done = view.job.progress
        data = ProgressAnswer.model_validate(done, from_attributes=True)
        return Event(f"{view.last}.{done.prompt}.{done.phase}.{done.step}", "progress", data)
    return None


class EventStream(StreamingResponse):
    """Sends what happens to a job, from `view` on, to a client whose last event is `seen`.

    It ends after the terminal state, or after `LONGEST_S`.
    """

    media_type = "text/event-stream"

    def __init__(self, following: Following, view: View, seen: str) -> None:
        self._events = _stream(following, view, seen)
        # nginx holds answers back otherwise.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._events, headers=headers)

    async def stream_response(self, send: Send) -> None:
        """Send all events; a client that goes away ends the following at once."""
        async with aclosing(self._events):
            await super().stream_response(send)


async def _stream(following: Following, view: View, seen: str) -> AsyncGenerator[str, Any]:
    clock = asyncio.get_running_loop().time
    end = clock() + LONGEST_S
    yield f"retry: {RETRY_MS}\n\n"
    with following.of(view.job.id) as follower:
        while True:
            for event in news(view, seen):
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
                    yield ": the job goes on\n\n"
            view = newer
