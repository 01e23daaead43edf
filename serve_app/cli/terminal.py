"""Jobs of a server in the terminal: one line or JSON object per job on stdout, live progress on stderr."""

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
"""There is no option for the key, because all users of a machine can see command lines."""

FIRST_PATIENCE_S = 30.0
"""How long commands retry an unreachable server, in seconds; while they watch, it is `PATIENCE_S`."""

FAILED, UNREACHABLE = 1, 3
"""Exit codes: a request was refused or did not succeed; the server cannot be reached. 2 is wrong usage."""

NO_ANSWER = ("UNREACHABLE", "CONNECTION_LOST")

Row = dict[str, Any]
"""One request: the server's fields, and `file`, `saved`, `note` or `refused` added here."""


class Board:
    """Shows a live line per job on stderr until the block ends."""

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
        """Add a line; return the function that updates it."""
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
    """Return a few words about the state of a job."""
    done = status.progress
    if status.status is JobState.FAILED:
        return f"{status.error_code or 'failed'}: {status.error}"
    if status.status is JobState.IN_QUEUE and status.queue_position is not None:
        return f"in_queue, {status.queue_position} ahead"
    if status.status is not JobState.IN_PROGRESS or done is None:
        return status.status
    phase = f"step {done.step} of {done.steps}" if done.phase == Phase.STEP else done.phase
    return f"{phase}, prompt {done.prompt + 1} of {done.prompts}" if done.prompts > 1 else phase


async def submit(url: str, bodies: Mapping[str, Row], *, watch: bool) -> AsyncIterator[Row]:
    """Submit request bodies, keyed by file name; yield a row for each, with `watch` after it has ended."""
    submitted: list[Row] = []
    async with _connect(url, FIRST_PATIENCE_S) as client:
        for file, body in bodies.items():
            row = {"file": file} | await _or_refusal(_submit(client, body))
            submitted.append(row)
            if not watch:
                yield row
    if watch:
        async for row in _watch(url, submitted, None):
            yield row


async def get(url: str, ids: Iterable[str], *, watch: bool, out: Path | None) -> AsyncIterator[Row]:
    """Yield a row for each request, with `watch` after it has ended; save its outputs into `out`."""
    requests: list[Row] = [{"request_id": request_id} for request_id in ids]
    if watch:
        async for row in _watch(url, requests, out):
            yield row
        return
    async with _connect(url, FIRST_PATIENCE_S) as client:
        for row in requests:
            yield row | await _or_refusal(_read(client, row["request_id"], out))


async def cancel(url: str, ids: Iterable[str]) -> AsyncIterator[Row]:
    """Cancel requests; yield a row for each."""
    async with _connect(url, FIRST_PATIENCE_S) as client:
        for request_id in ids:
            yield {"request_id": request_id} | await _or_refusal(_cancel(client, request_id))


async def models(url: str) -> AsyncIterator[Row]:
    """Yield a row for each model of a server."""
    async with _connect(url, FIRST_PATIENCE_S) as client:
        try:
            for model in await client.models():
                yield model.model_dump(mode="json")
        except LoraServeError as error:
            yield _refusal(error)


def print_rows(rows: AsyncIterator[Row], *, as_json: bool, failing: Container[str] = ()) -> int:
    """Print rows as they arrive; return the exit code. Without `as_json`, refusals go to stderr.

    `failing` are the job states that make the exit code `FAILED`.
    """

    async def run() -> int:
        worst = 0
        async for row in rows:
            refused = row.get("refused")
            if as_json:
                print(json.dumps(row, ensure_ascii=False), flush=True)
            else:
                print(_line(row), file=sys.stderr if refused else sys.stdout, flush=True)
            if refused:
                worst = max(worst, UNREACHABLE if refused["code"] in NO_ANSWER else FAILED)
            elif row.get("status", "") in failing:
                worst = max(worst, FAILED)
        return worst

    return asyncio.run(run())


def _connect(url: str, patience_s: float) -> AsyncLoraServe:
    return AsyncLoraServe(url, os.environ.get(KEY_VARIABLE) or None, patience_s=patience_s)


async def _or_refusal(row: Awaitable[Row]) -> Row:
    try:
        return await row
    except LoraServeError as error:
        return _refusal(error)


def _refusal(error: LoraServeError) -> Row:
    return {"refused": {"code": error.code, "message": error.message, "details": error.details}}


async def _submit(client: AsyncLoraServe, body: Row) -> Row:
    submitted = await client.submit(body)
    return submitted.model_dump(mode="json")


async def _cancel(client: AsyncLoraServe, request_id: str) -> Row:
    status = await client.cancel(request_id)
    return status.model_dump(mode="json")


async def _read(client: AsyncLoraServe, request_id: str, out: Path | None) -> Row:
    status = await client.status(request_id)
    row = status.model_dump(mode="json") | {"note": note_of(status)}
    if status.status is not JobState.SUCCEEDED:
        return row
    result = await client.result(request_id)
    if out is not None:
        row["saved"] = [str(await client.download(file, out / name)) for name, file in result.named()]
    return result.model_dump(mode="json") | row


async def _watch(url: str, requests: Iterable[Row], out: Path | None) -> AsyncIterator[Row]:
    async def wait_and_read(row: Row) -> Row:
        request_id = row["request_id"]
        name = f"{request_id}  {Path(row['file']).name}" if "file" in row else request_id
        await client.wait(request_id, on_status=board.watch(name))
        return await _read(client, request_id, out)

    async def watch(row: Row) -> Row:
        return row if "refused" in row else row | await _or_refusal(wait_and_read(row))

    async with _connect(url, PATIENCE_S) as client:
        with Board() as board:
            ended = await asyncio.gather(*map(watch, requests))
    for row in ended:
        yield row


def _line(row: Row) -> str:
    """Return the text of a row: a model, a refusal, or a request with its outputs."""
    if "refused" in row:
        name = row.get("file") or row.get("request_id") or "the server"
        return f"{name}: {row['refused']['code']}: {row['refused']['message']}"
    if "default_steps" in row:
        return f"{row['id']:<28}{row['default_steps']:>4} steps  {row['base_model']}"
    files = [*row["outputs"]["images"], *row["outputs"]["videos"]] if row.get("outputs") else []
    urls = row.get("saved") or [file["url"] or file["file_path"] for file in files]
    file = [row["file"]] if "file" in row else []
    return "  ".join([row["request_id"], row.get("note") or row.get("status") or "queued", *file, *urls])
