"""Batches for notebooks and scripts: submit a table times a grid, watch it, and collect the results.

    batch = Batch(LoraServe("http://127.0.0.1:8000"))
    batch.submit("prompts.csv", model="flux", loras=["a.safetensors"], multipliers=[0.6, 1.0], seeds=[1, 2])
    batch.wait()
    batch.frame()

The service stores the requests, so you lose nothing if you lose the notebook: `Batch(client, batch_id)` finds
them again. With Ray client, get the client from `serve_app.client.ray_client.connect`. Importing this module
loads neither torch nor Ray nor pandas.
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
"""Requests per call, and so per transaction; the service accepts up to 1000."""

CHUNK_BYTES = 32 * 2**20
"""Most bytes per call, including control images; the service accepts 64 MiB."""

POLL_S = 1.0
"""Seconds between two reads of the counts in `wait`, and between attempts while the queue is full."""

PAGE = 200
"""Results per page."""

FETCHES = 8
"""Pictures of a contact sheet that are downloaded at the same time."""

RESULT_COLUMNS = ("request_id", "status", "url", "manifest_url", "error_code", "error")
"""Columns that `map_batches` adds."""

SMALL_CPU = 0.1
"""Ray CPUs per task. Tasks only wait, and must not take the CPUs that a worker needs to start."""


class Batch:
    """Requests that are submitted, watched and canceled together, on the service of `client`."""

    def __init__(self, client: LoraServe, batch_id: str | None = None) -> None:
        """Make a new batch, or with `batch_id` continue one that this or another process submitted.

        Sends nothing. Raises `ValueError` if `batch_id` is not a UUID.
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

        `table` is anything that `read_rows` accepts. `COLUMNS` lists its columns; others are ignored with a
        warning. `defaults` are values for columns that a row does not have. A chunk is stored completely or
        not at all, and only once, so after an interruption submit the same table again: that adds what is
        missing. While the queue is full, this waits. Raises `Refused` at the first refused chunk, with the
        refused rows in the notes of the exception, and `ValueError` for an invalid table.
        """
        rows = read_rows(table)
        if unknown := sorted({name for row in rows for name in row} - COLUMNS):
            warnings.warn(f"ignored unknown columns: {', '.join(unknown)}", stacklevel=2)
        requests = requests_of(rows, loras=loras, multipliers=multipliers, seeds=seeds, **defaults)
        if not requests:
            raise ValueError("the table has no rows")
        with _bar("submitted", len(requests), progress) as bar:
            for start, part in _chunks(requests, chunk):
                # The key includes the position, because a table may contain the same rows twice.
                digest = hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
                body = {"batch_id": self.id, "requests": part}
                try:
                    self._post_when_queue_has_room(
                        "/v1/batches", body=body, key=f"{self.id}:{start}:{digest}"
                    )
                except Refused as error:
                    for each in error.details.get("errors", ()) if error.code == "BATCH_REFUSED" else ():
                        reason = f"{each['code']}: {each['message']} {each['details']}"
                        error.add_note(f"request {start + each['index']}: {reason}")
                    raise
                bar.update(len(part))
        return self

    def counts(self) -> Counts:
        """Return how many requests are in each state; raise `Refused` if nothing was submitted."""
        return self._counts(self._client.send("GET", f"/v1/batches/{self.id}"))

    def wait(self, *, timeout_s: float | None = None, progress: bool = True) -> Counts:
        """Wait until all requests have ended, at most `timeout_s` seconds. Interrupting it stops no job."""
        end = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        with _bar("rendered", 0, progress) as bar:
            while True:
                counts = self.counts()
                bar.total, bar.n = counts.total, counts.ended
                bar.set_postfix(running=counts.in_progress, failed=counts.failed, canceled=counts.canceled)
                if counts.ended == counts.total or time.monotonic() >= end:
                    return counts
                time.sleep(POLL_S)

    def results(self) -> Iterator[BatchResult]:
        """Yield every request with its result, in the order of submission."""
        query = {"limit": str(PAGE)}
        while True:
            answer = self._client.send("GET", f"/v1/batches/{self.id}/results", query=query)
            yield from map(BatchResult.model_validate, answer["results"])
            if answer["next_cursor"] is None:
                return
            query["cursor"] = answer["next_cursor"]

    def frame(self) -> pandas.DataFrame:
        """Return one row per requested picture or video, in the order of submission.

        `waited_s` and `ran_s` are seconds in the queue and on a worker, `inference_s` seconds of rendering.
        `url` is missing until the request has succeeded. If outputs are stored in S3, `url` expires.
        """
        import pandas

        return pandas.DataFrame([row for result in self.results() for row in result.rows])

    def sheet(self, *, columns: int = 4, side: int = 256, most: int = 100) -> Image.Image:
        """Return a contact sheet of the first `most` outputs, as RGB.

        It has `columns` pictures per row, each at most `side` pixels wide and high, with prompt, LoRA,
        multiplier and seed below. A tile without a picture shows the reason instead.
        """
        outputs = ((result, index) for result in self.results() for index in range(len(result.prompts)))
        shown = list(itertools.islice(outputs, most))
        with ThreadPoolExecutor(FETCHES) as threads:
            pictures = threads.map(lambda each: self._thumbnail(each[0], each[1], side), shown)
            labels = [result.label(index) for result, index in shown]
            return contact_sheet(list(map(Tile, pictures, labels)), columns, side)

    def cancel(self) -> Counts:
        """Cancel all requests that have not ended. Queued ones end at once, running ones within one step."""
        return self._counts(self._client.send("DELETE", f"/v1/batches/{self.id}"))

    def retry(self, *, progress: bool = True) -> int:
        """Submit the failed requests again, as new ones that replace them; return how many."""
        left = failed = self.counts().failed
        with _bar("submitted", failed, progress) as bar:
            while left:
                query = {"limit": str(min(left, CHUNK))}
                path = f"/v1/batches/{self.id}/retry"
                retried = self._post_when_queue_has_room(path, query=query, key=str(uuid.uuid4()))["retried"]
                if not retried:
                    break
                left = max(left - retried, 0)
                bar.update(retried)
        return failed - left

    def _counts(self, answer: Mapping[str, Any]) -> Counts:
        return Counts.model_validate(answer["counts"])

    def _post_when_queue_has_room(self, path: str, **options: Any) -> Any:  # noqa: ANN401 - any JSON
        """Post a request, and repeat it while the queue is full."""
        while True:
            try:
                return self._client.send("POST", path, **options)
            except Refused as error:
                if error.code != "TOO_MANY_QUEUED":
                    raise
                time.sleep(POLL_S)

    def _thumbnail(self, result: BatchResult, index: int, side: int) -> Image.Image | str:
        """Return a thumbnail, or a word that says why there is none."""
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
    """Render the rows of a Ray dataset; return it with the columns `RESULT_COLUMNS` added, strings or null.

    Rows are like those of a table for `Batch.submit`, and may have more columns. At most `in_flight` chunks
    of `chunk` rows are submitted at a time. One task processes each block, so repartition a dataset that has
    fewer blocks than `in_flight`. Tasks reach the gateway through Serve, or by HTTP at `url`. A refused
    request fails the dataset; a failed job has its `error` in the row. If Ray runs a task again, it does not
    submit the requests again.
    """
    render = partial(_render, run=uuid.uuid4(), url=url, api_key=api_key, defaults=defaults)
    return dataset.map_batches(
        render, batch_size=chunk, batch_format="pyarrow", concurrency=in_flight, num_cpus=SMALL_CPU
    )


def _render(
    table: pyarrow.Table, run: uuid.UUID, url: str | None, api_key: str | None, defaults: Mapping[str, Any]
) -> pyarrow.Table:
    """Render a chunk as a batch. Its id depends only on `run` and the rows: a repeated task adds nothing."""
    import pyarrow

    if taken := set(RESULT_COLUMNS) & set(table.column_names):
        raise ValueError(
            f"rename these columns of the dataset, results use their names: {', '.join(sorted(taken))}"
        )
    rows = [{name: value for name, value in row.items() if name in COLUMNS} for row in read_rows(table)]
    contents = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    with connect(api_key=api_key) if url is None else LoraServe(url, api_key) as client:
        batch = Batch(client, str(uuid.uuid5(run, contents)))
        batch.submit(rows, progress=False, **defaults)
        batch.wait(progress=False)
        made = [row for result in batch.results() for row in result.rows]
    for name in RESULT_COLUMNS:
        table = table.append_column(name, pyarrow.array([row[name] for row in made], pyarrow.string()))
    return table


def _chunks(requests: Sequence[Mapping[str, Any]], most: int) -> Iterator[tuple[int, list[Any]]]:
    """Split requests into chunks for one call, always at the same places; yield each with its start index."""
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
    """Show a progress bar in a notebook or a terminal until the block ends."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="", disable=not shown) as bar:
        yield bar
