"""Batches from notebooks and scripts: a table times a grid, submitted, watched, collected, and found again.

    batch = Batch(LoraServe("http://127.0.0.1:8000"))
    batch.submit("prompts.csv", model="flux", loras=["a.safetensors"], multipliers=[0.6, 1.0], seeds=[1, 2])
    batch.wait()
    batch.frame()

The requests lie in the service's job table: who loses the notebook loses nothing, and `batch.id` finds them
again. Where Ray client is the way into the cluster, `serve_app.client.ray_client.connect` makes the client.
Importing this loads neither torch nor Ray nor pandas.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from PIL import Image

from serve_app.batch.contact_sheet import Tile, contact_sheet
from serve_app.batch.tables import COLUMNS, Lora, read_rows, requests_of
from serve_app.client import LoraServe, LoraServeError, Refused
from serve_app.client.batches import BatchResult, Counts
from serve_app.client.files import picture_text
from serve_app.client.ray_client import connect

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from ray.data import Dataset

CHUNK = 500
"""Requests of one call, and so of one transaction; the service takes up to 1000."""

CHUNK_BYTES = 32 * 2**20
"""Most bytes of one call: control images are in it, and the service takes 64 MiB."""

LOOK_S = 1.0
"""How often `wait` asks for the counts, in seconds."""

PAGE = 200
"""Results that are read at a time."""

FETCHES = 8
"""Pictures of a contact sheet that are fetched at a time."""

MADE = ("request_id", "status", "url", "manifest_url", "error_code", "error")
"""Columns that `map_batches` adds."""

SMALL_CPU = 0.1
"""CPUs of a task that waits for pictures: it must not keep a worker from its place."""


class Batch:
    """Requests that are submitted and looked after together, on the service that `client` is connected to."""

    def __init__(self, client: LoraServe, batch_id: str | None = None) -> None:
        """Name a new batch, or with its id one that is there: another process may have submitted it.

        Nothing is sent. Raises `ValueError` for an id that is none.
        """
        self.id = str(uuid.uuid4() if batch_id is None else uuid.UUID(batch_id))
        self._client = client

    def __repr__(self) -> str:
        return f"Batch({self.id!r})"

    def submit(
        self,
        table: object,
        *,
        loras: Sequence[Lora] = (),
        multipliers: Sequence[float] = (),
        seeds: Sequence[int] = (),
        chunk: int = CHUNK,
        progress: bool = True,
        **defaults: Any,  # noqa: ANN401 - any column
    ) -> Self:
        """Submit a request for each row of `table` x LoRA x multiplier x seed, `chunk` of them at a time.

        `table` is what `read_rows` takes; its columns, and `defaults` for rows that do not have them, are
        those of `COLUMNS`; others are left out with a warning. A chunk is stored whole or not at all, and
        only once: to submit the same table again, after whatever interrupted it, adds what is missing. While
        the queue is full this waits for room. Raises `Refused`, as soon as a chunk is; `ValueError` for a bad
        table.
        """
        rows = read_rows(table)
        if unknown := sorted({name for row in rows for name in row} - COLUMNS):
            warnings.warn(f"columns that no request has were left out: {', '.join(unknown)}", stacklevel=2)
        requests = requests_of(rows, loras=loras, multipliers=multipliers, seeds=seeds, **defaults)
        if not requests:
            raise ValueError("the table has no rows")
        with _bar("submitted", len(requests), progress) as bar:
            for start, part in _chunks(requests, chunk):
                # The place as well: a table may repeat itself.
                digest = hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
                body = {"batch_id": self.id, "requests": part}
                try:
                    self._when_there_is_room("/v1/batches", body=body, key=f"{self.id}:{start}:{digest}")
                except Refused as error:
                    for each in error.details.get("errors", ()) if error.code == "BATCH_REFUSED" else ():
                        told = f"{each['code']}: {each['message']} {each['details']}"
                        error.add_note(f"request {start + each['index']}: {told}")
                    raise
                bar.update(len(part))
        return self

    def counts(self) -> Counts:
        """Return how many requests are in each state; raises `Refused` where nothing was submitted."""
        return self._counts(self._client.send("GET", f"/v1/batches/{self.id}"))

    def wait(self, *, timeout_s: float | None = None, progress: bool = True) -> Counts:
        """Return when every request has ended, or after `timeout_s` seconds. Interrupt it at will."""
        end = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        with _bar("rendered", 0, progress) as bar:
            while True:
                counts = self.counts()
                bar.total, bar.n = counts.total, counts.ended
                bar.set_postfix(running=counts.in_progress, failed=counts.failed, canceled=counts.canceled)
                if counts.ended == counts.total or time.monotonic() >= end:
                    return counts
                time.sleep(LOOK_S)

    def results(self) -> Iterator[BatchResult]:
        """Yield every request with what came of it, in the order of submission."""
        query = {"limit": str(PAGE)}
        while True:
            answer = self._client.send("GET", f"/v1/batches/{self.id}/results", query=query)
            yield from map(BatchResult.model_validate, answer["results"])
            if answer["next_cursor"] is None:
                return
            query["cursor"] = answer["next_cursor"]

    def frame(self) -> pandas.DataFrame:
        """Return a row for each picture or video asked for, in the order of submission.

        `waited_s` and `ran_s` are seconds in the queue and on a worker, `inference_s` those of rendering;
        `url` is missing until the request has succeeded, and expires where outputs lie in S3.
        """
        import pandas

        return pandas.DataFrame([row for result in self.results() for row in result.rows])

    def sheet(self, *, columns: int = 4, side: int = 256, most: int = 100) -> Image.Image:
        """Return the first `most` pictures in rows of `columns`, each at most `side` pixels wide and high.

        Below each are its prompt, LoRA, multiplier and seed; what did not succeed says why.
        """
        asked = ((result, index) for result in self.results() for index in range(len(result.prompts)))
        shown = list(itertools.islice(asked, most))
        with ThreadPoolExecutor(FETCHES) as threads:
            pictures = threads.map(lambda each: self._thumbnail(each[0], each[1], side), shown)
            labels = [result.label(index) for result, index in shown]
            return contact_sheet(list(map(Tile, pictures, labels)), columns, side)

    def cancel(self) -> Counts:
        """Cancel what has not ended: at once what is queued, within one step what runs."""
        return self._counts(self._client.send("DELETE", f"/v1/batches/{self.id}"))

    def retry(self, *, progress: bool = True) -> int:
        """Submit those again that have failed by now; return how many. They take the failed ones' place."""
        left = failed = self.counts().failed
        with _bar("submitted", failed, progress) as bar:
            while left:
                query = {"limit": str(min(left, CHUNK))}
                path = f"/v1/batches/{self.id}/retry"
                retried = self._when_there_is_room(path, query=query, key=str(uuid.uuid4()))["retried"]
                if not retried:
                    break
                left = max(left - retried, 0)
                bar.update(retried)
        return failed - left

    def _counts(self, answer: Mapping[str, Any]) -> Counts:
        return Counts.model_validate(answer["counts"])

    def _when_there_is_room(self, path: str, **options: Any) -> Any:  # noqa: ANN401 - any JSON
        """Post until the queue has room, however long the jobs before these take."""
        while True:
            try:
                return self._client.send("POST", path, **options)
            except Refused as error:
                if error.code != "TOO_MANY_QUEUED":
                    raise
                time.sleep(LOOK_S)

    def _thumbnail(self, result: BatchResult, index: int, side: int) -> Image.Image | str:
        """Return a picture made small, or a word that says why there is none."""
        output = result.files[index]
        if output is None:
            return result.error_code or result.status.value
        if output.format == "mp4":
            return "video"
        with TemporaryDirectory() as folder:
            try:
                file = self._client.download(output, Path(folder) / "picture")
            except LoraServeError as error:
                return error.code
            with Image.open(file) as picture:
                picture.thumbnail((side, side))
                return picture.convert("RGB")


def map_batches(
    dataset: Dataset,
    *,
    url: str | None = None,
    api_key: str | None = None,
    chunk: int = 100,
    in_flight: int = 4,
    **defaults: Any,  # noqa: ANN401 - any column
) -> Dataset:
    """Return the rows of a Ray dataset with what the service made of them: the columns `MADE`, texts or null.

    Rows are what a table of `Batch.submit` has, and may have more columns. They are submitted `chunk` at a
    time, at most `in_flight` chunks at once, each block of the dataset by one task: repartition a dataset of
    fewer blocks. Tasks reach the gateway through Serve, or by HTTP at `url`. A chunk with a request that is
    refused fails the dataset; a job that fails has its `error`. A task that Ray runs again submits nothing
    again.
    """
    named = {"run": uuid.uuid4(), "url": url, "api_key": api_key, "defaults": defaults}
    render = partial(_render, **named)
    return dataset.map_batches(
        render, batch_size=chunk, batch_format="pyarrow", concurrency=in_flight, num_cpus=SMALL_CPU
    )


def _render(
    table: pyarrow.Table, run: uuid.UUID, url: str | None, api_key: str | None, defaults: Mapping[str, Any]
) -> pyarrow.Table:
    """Render a chunk, as a batch whose name says what is in it."""
    import pyarrow

    if taken := set(MADE) & set(table.column_names):
        raise ValueError(f"columns of the dataset have the names of results: {', '.join(sorted(taken))}")
    rows = [{name: value for name, value in row.items() if name in COLUMNS} for row in read_rows(table)]
    contents = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    with connect(api_key=api_key) if url is None else LoraServe(url, api_key) as client:
        batch = Batch(client, str(uuid.uuid5(run, contents)))
        batch.submit(rows, progress=False, **defaults)
        batch.wait(progress=False)
        made = [row for result in batch.results() for row in result.rows]
    for name in MADE:
        table = table.append_column(name, pyarrow.array([row[name] for row in made], pyarrow.string()))
    return table


def _chunks(requests: Sequence[Mapping[str, Any]], most: int) -> Iterator[tuple[int, list[Any]]]:
    """Cut requests into chunks that one call takes, the same at each run; yield where each begins."""
    part: list[Any] = []
    start = size = 0
    for index, request in enumerate(requests):
        text = json.dumps(request, default=picture_text, allow_nan=False)
        if part and (len(part) == most or size + len(text) > CHUNK_BYTES):
            yield start, part
            part, start, size = [], index, 0
        part.append(json.loads(text))
        size += len(text)
    yield start, part


@contextmanager
def _bar(what: str, total: int, shown: bool) -> Iterator[Any]:
    """Show a progress bar, in a notebook or in a terminal."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="", disable=not shown) as bar:
        yield bar
