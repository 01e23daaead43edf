"""Jobs of a server in the terminal: a line or a JSON object of each on stdout, the way there on stderr."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from cluster.jobs.model import JobState, Phase
from serve_app.client import AsyncLoraServe, LoraServeError, Status
from serve_app.client.core import OnStatus
from serve_app.client.sending import PATIENCE_S

KEY_VARIABLE = "LORA_SERVE_API_KEY"
"""Not an option: command lines are seen by every user of a machine."""

FIRST_PATIENCE_S = 30.0
"""How long a server that cannot be reached is tried, before anything was watched."""

FAILED, UNREACHABLE = 1, 3
"""Exit codes: a request was refused or did not succeed; the service cannot be reached. 2 is wrong usage."""

NO_ANSWER = ("UNREACHABLE", "CONNECTION_LOST")

Told = dict[str, Any]
"""What is known of a request: fields of the wire, `file` and `saved` of this side, or `refused`."""


class Board:
    """A live line per job on stderr, until the block ends."""

    def __init__(self) -> None:
        console, note = Console(stderr=True), Column(min_width=20, no_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(10),
            TextColumn("{task.fields[note]}", markup=False, table_column=note),
        )
        self._lines = Progress(*columns, TimeElapsedColumn(), console=console, redirect_stdout=False)

    def __enter__(self) -> Board:
        self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.stop()

    def watch(self, name: str) -> OnStatus:
        """Add a line; return what moves it."""
        line = self._lines.add_task(name, total=1, note="")

        def show(status: Status) -> None:
            done = status.progress
            if status.ended:
                self._lines.update(line, total=1, completed=status.status is JobState.SUCCEEDED)
                self._lines.stop_task(line)
            elif done is not None:
                so_far = done.prompt * done.steps + done.step
                self._lines.update(line, total=done.prompts * done.steps, completed=so_far)
            self._lines.update(line, note=note_of(status))

        return show


def note_of(status: Status) -> str:
    """Return a few words on how a job is doing."""
    done = status.progress
    if status.status is JobState.FAILED:
        return f"{status.error_code or 'failed'}: {status.error}"
    if status.status is JobState.IN_QUEUE and status.queue_position is not None:
        return f"in_queue, {status.queue_position} ahead"
    if status.status is not JobState.IN_PROGRESS or done is None:
        return status.status
    phase = f"step {done.step} of {done.steps}" if done.phase == Phase.STEP else done.phase
    return f"{phase}, prompt {done.prompt + 1} of {done.prompts}" if done.prompts > 1 else phase


async def submit(url: str, bodies: Mapping[str, Told], *, watch: bool) -> AsyncIterator[Told]:
    """Submit bodies by the names of their files, in order; tell of each, at its end if it is watched."""
    submitted: list[Told] = []
    async with _connect(url, FIRST_PATIENCE_S) as client:
        for file, body in bodies.items():
            told = {"file": file} | await _tried(_submitted(client, body))
            submitted.append(told)
            if not watch:
                yield told
    if watch:
        async for told in _followed(url, submitted, None):
            yield told


async def get(url: str, ids: Iterable[str], *, watch: bool, out: Path | None) -> AsyncIterator[Told]:
    """Tell of requests, at their ends if they are watched; save what was made into `out`."""
    asked: list[Told] = [{"request_id": request_id} for request_id in ids]
    if watch:
        async for told in _followed(url, asked, out):
            yield told
        return
    async with _connect(url, FIRST_PATIENCE_S) as client:
        for told in asked:
            yield told | await _tried(_read(client, told["request_id"], out))


async def cancel(url: str, ids: Iterable[str]) -> AsyncIterator[Told]:
    """Cancel requests; tell of each."""
    async with _connect(url, FIRST_PATIENCE_S) as client:
        for request_id in ids:
            yield {"request_id": request_id} | await _tried(_canceled(client, request_id))


async def models(url: str) -> AsyncIterator[Told]:
    """Tell of the models that a server renders."""
    async with _connect(url, FIRST_PATIENCE_S) as client:
        try:
            for model in await client.models():
                yield model.model_dump(mode="json")
        except LoraServeError as error:
            yield _refusal(error)


def tell(found: AsyncIterator[Told], *, as_json: bool, bad: Container[str] = ()) -> int:
    """Print what is found as it comes, refusals on stderr unless as JSON; return the exit code.

    `bad` are the states of jobs that count as failed.
    """

    async def run() -> int:
        worst = 0
        async for told in found:
            refused = told.get("refused")
            if as_json:
                print(json.dumps(told, ensure_ascii=False), flush=True)
            else:
                print(_line(told), file=sys.stderr if refused else sys.stdout, flush=True)
            if refused:
                worst = max(worst, UNREACHABLE if refused["code"] in NO_ANSWER else FAILED)
            elif told.get("status", "") in bad:
                worst = max(worst, FAILED)
        return worst

    return asyncio.run(run())


def _connect(url: str, patience_s: float) -> AsyncLoraServe:
    return AsyncLoraServe(url, os.environ.get(KEY_VARIABLE) or None, patience_s=patience_s)


async def _tried(known: Awaitable[Told]) -> Told:
    try:
        return await known
    except LoraServeError as error:
        return _refusal(error)


def _refusal(error: LoraServeError) -> Told:
    return {"refused": {"code": error.code, "message": error.message, "details": error.details}}


async def _submitted(client: AsyncLoraServe, body: Told) -> Told:
    submitted = await client.submit(body)
    return submitted.model_dump(mode="json")


async def _canceled(client: AsyncLoraServe, request_id: str) -> Told:
    status = await client.cancel(request_id)
    return status.model_dump(mode="json")


async def _read(client: AsyncLoraServe, request_id: str, out: Path | None) -> Told:
    status = await client.status(request_id)
    told = status.model_dump(mode="json") | {"note": note_of(status)}
    if status.status is not JobState.SUCCEEDED:
        return told
    result = await client.result(request_id)
    if out is not None:
        told["saved"] = [str(await client.download(file, out / name)) for name, file in result.named()]
    return result.model_dump(mode="json") | told


async def _followed(url: str, asked: Iterable[Told], out: Path | None) -> AsyncIterator[Told]:
    async def end_of(told: Told) -> Told:
        request_id = told["request_id"]
        name = f"{request_id}  {Path(told['file']).name}" if "file" in told else request_id
        await client.wait(request_id, on_status=board.watch(name))
        return await _read(client, request_id, out)

    async def follow(told: Told) -> Told:
        return told if "refused" in told else told | await _tried(end_of(told))

    async with _connect(url, PATIENCE_S) as client:
        with Board() as board:
            ended = await asyncio.gather(*map(follow, asked))
    for told in ended:
        yield told


def _line(told: Told) -> str:
    """Return a line for people: a model, a refusal, or a request with what it made."""
    if "refused" in told:
        name = told.get("file") or told.get("request_id") or "the server"
        return f"{name}: {told['refused']['code']}: {told['refused']['message']}"
    if "default_steps" in told:
        return f"{told['id']:<28}{told['default_steps']:>4} steps  {told['base_model']}"
    files = [*told["outputs"]["images"], *told["outputs"]["videos"]] if told.get("outputs") else []
    urls = told.get("saved") or [file["url"] or file["file_path"] for file in files]
    file = [told["file"]] if "file" in told else []
    return "  ".join([told["request_id"], told.get("note") or told.get("status") or "queued", *file, *urls])
