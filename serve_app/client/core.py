"""Sans-I/O core: the operations of the clients, as generators of requests and pauses."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from urllib.parse import quote

from PIL import Image
from pydantic import BaseModel, ValidationError

from cluster.jobs.model import JobState
from serve_app.client.answers import Model, Models, Output, Result, Status, Submitted
from serve_app.client.errors import JobFailed, Refused, WaitTimeout
from serve_app.client.files import Saving, copy_local
from serve_app.client.sending import Operation, Pause, Request, Sender, invalid_answer

POLL_S = 30.0
"""Length of a long poll in seconds; below the 60 s that the service and most proxies allow."""

WATCH_S = 1.0
"""Length of a long poll with an `on_status` callback; the service writes progress every second."""

OnStatus = Callable[[Status], object]

Answer = TypeVar("Answer", bound=BaseModel)


class Core(Sender):
    """All operations on one service."""

    def submit(self, request: Request, idempotency_key: str | None) -> Operation[Submitted]:
        """Store a request; retries do not store it again."""
        key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        answer = yield from self.send("POST", "/v1/inference", body=request, key=key)
        return _read(Submitted, answer)

    def status(self, request_id: str) -> Operation[Status]:
        """Read the status of a job."""
        return _read(Status, (yield from self.send("GET", _path(request_id, "/status"))))

    def result(self, request_id: str) -> Operation[Result]:
        """Read the result of a job."""
        return _read(Result, (yield from self.send("GET", _path(request_id, "/result"))))

    def models(self) -> Operation[list[Model]]:
        """List the models."""
        return list(_read(Models, (yield from self.send("GET", "/v1/models"))).models)

    def cancel(self, request_id: str) -> Operation[Status]:
        """Cancel a job. A canceled job is no error: an attempt whose answer was lost may have canceled it."""
        try:
            return _read(Status, (yield from self.send("DELETE", _path(request_id))))
        except Refused as error:
            if error.details.get("status") != JobState.CANCELED:
                raise
            return (yield from self.status(request_id))

    def wait(self, request_id: str, timeout_s: float | None, on_status: OnStatus | None) -> Operation[Status]:
        """Poll until the job has ended; raise `WaitTimeout` after `timeout_s` seconds."""
        end = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        pauses = self._pauses()
        while True:
            sent = time.monotonic()
            wait_s = max(min(WATCH_S if on_status else POLL_S, end - sent), 0.0)
            query = {"wait": f"{wait_s:g}"}
            path, left_s = _path(request_id, "/status"), max(end - sent, 0.0)
            answer = yield from self.send("GET", path, query=query, wait_s=wait_s, within_s=left_s)
            status = _read(Status, answer)
            if on_status is not None:
                on_status(status)
            if status.ended:
                return status
            if time.monotonic() >= end:
                message = f"The job {request_id} has not ended after {timeout_s:g} s. It continues."
                raise WaitTimeout("WAIT_TIMEOUT", message, status.model_dump(mode="json"))
            # The reference server has no long polls: it answers at once.
            early_s = sent + wait_s - time.monotonic()
            if early_s > 0:
                yield Pause(min(next(pauses), early_s))

    def finish(
        self, request_id: str, timeout_s: float | None, on_status: OnStatus | None
    ) -> Operation[Result]:
        """Wait for a job and return its result; raise `JobFailed` if it did not succeed."""
        status = yield from self.wait(request_id, timeout_s, on_status)
        if status.status is not JobState.SUCCEEDED:
            raise JobFailed(status)
        return (yield from self.result(request_id))

    def render(self, request: Request) -> Operation[Result]:
        """Submit a request and return the result of its job."""
        submitted = yield from self.submit(request, None)
        return (yield from self.finish(submitted.request_id, None, None))

    def generate(
        self,
        request: Request,
        folder: Path,
        timeout_s: float | None,
        on_status: OnStatus | None,
    ) -> Operation[list[Image.Image | Path]]:
        """Submit, wait and download: pictures into memory, videos into `folder`."""
        submitted = yield from self.submit(request, None)
        result = yield from self.finish(submitted.request_id, timeout_s, on_status)
        made: list[Image.Image | Path] = []
        with TemporaryDirectory() as scratch:
            for name, output in result.named():
                # Only videos have frames; a format such as webp may be either.
                if output.num_frames is not None:
                    made.append((yield from self.download(output, folder / name)))
                    continue
                with Image.open((yield from self.download(output, Path(scratch) / name))) as picture:
                    picture.load()
                made.append(picture)
        return made

    def download(self, output: Output, path: Path) -> Operation[Path]:
        """Download a file completely or not at all."""
        with Saving(path) as saving:
            if output.url is None:
                copy_local(output.file_path, saving)
            else:
                yield from self.fetch(output.url, saving)
            saving.keep(output.sha256)
        return path


def _path(request_id: str, tail: str = "") -> str:
    return f"/v1/requests/{quote(request_id, safe='')}{tail}"


def _read(kind: type[Answer], answer: object) -> Answer:
    try:
        return kind.model_validate(answer)
    except ValidationError:
        raise invalid_answer(kind.__name__) from None
