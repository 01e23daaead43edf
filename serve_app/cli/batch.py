"""`lora-serve batch`: submit a table of requests to a server, and manage it as one batch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve_app.cli.requests import LOCAL, AsJson, Url

if TYPE_CHECKING:
    from serve_app.batch.batch import Batch
    from serve_app.client.batches import Counts

app = typer.Typer(
    help="Submit a table of requests, and watch, cancel or retry them together.", no_args_is_help=True
)

Id = Annotated[str, typer.Argument(help="Id of a batch.", show_default=False)]
Watch = Annotated[bool, typer.Option("--watch", help="Show a progress bar until all requests have ended.")]


@app.command()
def submit(
    table: Annotated[Path, typer.Argument(help="A .csv or .jsonl file with one request per row.")],
    model: Annotated[str | None, typer.Option(help="Model for rows that do not name one.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA for every row. Several make a grid: repeat the option.")
    ] = None,
    multiplier: Annotated[
        list[float] | None, typer.Option(help="Multiplier of the LoRA. Several make a grid, as with --lora.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed for every row. Several make a grid, as with --lora.")
    ] = None,
    batch_id: Annotated[
        str | None, typer.Option("--id", help="Continue this batch: submit only what is missing.")
    ] = None,
    watch: Watch = False,
    as_json: AsJson = False,
    url: Url = LOCAL,
) -> None:
    """Submit a request for each row x LoRA x multiplier x seed.

    Exit codes: 0 for success, 1 if a request was refused or (with --watch) did not succeed, 2 for wrong
    usage, 3 if the server cannot be reached.
    """

    def act(batch: Batch) -> Counts:
        # Printed before the first request, so that an interrupted batch can be continued.
        typer.echo(f"batch {batch.id}", err=True)
        batch.submit(table, loras=lora or (), multipliers=multiplier or (), seeds=seed or (), model=model)
        return batch.counts()

    _run(act, url, batch_id, watch, as_json)


@app.command()
def get(batch_id: Id, watch: Watch = False, as_json: AsJson = False, url: Url = LOCAL) -> None:
    """Show how many requests of a batch are in each state. Exit codes as for submit."""
    _run(lambda batch: batch.counts(), url, batch_id, watch, as_json)


@app.command()
def cancel(batch_id: Id, as_json: AsJson = False, url: Url = LOCAL) -> None:
    """Cancel all requests of a batch that have not ended. Exit codes as for submit."""
    _run(lambda batch: batch.cancel(), url, batch_id, False, as_json)


@app.command()
def retry(batch_id: Id, watch: Watch = False, as_json: AsJson = False, url: Url = LOCAL) -> None:
    """Submit the failed requests of a batch again. Exit codes as for submit."""

    def act(batch: Batch) -> Counts:
        batch.retry()
        return batch.counts()

    _run(act, url, batch_id, watch, as_json)


def _run(act: Callable[[Batch], Counts], url: str, batch_id: str | None, watch: bool, as_json: bool) -> None:
    """Act on a batch, print its counts, and exit."""
    from serve_app.batch.batch import Batch
    from serve_app.cli.terminal import FAILED, KEY_VARIABLE, NO_ANSWER, UNREACHABLE
    from serve_app.client import LoraServe, LoraServeError

    try:
        with LoraServe(url, os.environ.get(KEY_VARIABLE)) as client:
            batch = Batch(client, batch_id)
            counts = act(batch)
            if watch:
                counts = batch.wait()
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    except LoraServeError as error:
        typer.echo("\n".join([str(error), *getattr(error, "__notes__", ())]), err=True)
        raise typer.Exit(UNREACHABLE if error.code in NO_ANSWER else FAILED) from None
    states = {state: getattr(counts, state) for state in type(counts).model_fields}
    if as_json:
        typer.echo(json.dumps({"batch_id": batch.id, "total": counts.total, "counts": states}))
    else:
        typer.echo("  ".join([batch.id, *(f"{count} {state}" for state, count in states.items() if count)]))
    raise typer.Exit(FAILED if watch and counts.succeeded < counts.total else 0)
