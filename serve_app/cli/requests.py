"""`lora-serve submit`, `get` and `cancel`: requests on a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Url = Annotated[
    str,
    typer.Option(envvar="LORA_SERVE_URL", help="Address of the server. Set its key in LORA_SERVE_API_KEY."),
]
Watch = Annotated[bool, typer.Option("--watch", help="Show a live line per job until all have ended.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]
Ids = Annotated[list[str], typer.Argument(help="Ids of requests.", show_default=False)]

LOCAL = "http://127.0.0.1:8000"


def submit(
    files: Annotated[list[Path], typer.Argument(help="JSON files with one body of POST /v1/inference each.")],
    watch: Watch = False,
    as_json: AsJson = False,
    url: Url = LOCAL,
) -> None:
    """Submit requests to a server.

    Exit codes: 0 for success, 1 if a request was refused or (with --watch) did not succeed, 2 for wrong
    usage, 3 if the server cannot be reached.
    """
    from serve_app.cli import terminal

    bodies = {str(file): _body(file) for file in files}
    _print_and_exit(terminal.submit(url, bodies, watch=watch), as_json, "failed", "canceled")


def get(
    ids: Ids,
    watch: Watch = False,
    out: Annotated[Path | None, typer.Option(help="Save pictures and videos into this directory.")] = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
) -> None:
    """Show the status and outputs of requests. Exit codes as for submit."""
    from serve_app.cli import terminal

    _print_and_exit(terminal.get(url, ids, watch=watch, out=out), as_json, "failed", "canceled")


def cancel(ids: Ids, as_json: AsJson = False, url: Url = LOCAL) -> None:
    """Cancel requests. Queued ones end at once, running ones within one step. Exit codes as for submit."""
    from serve_app.cli import terminal

    _print_and_exit(terminal.cancel(url, ids), as_json)


def models(url: str, as_json: bool) -> None:
    """List the models of a server."""
    from serve_app.cli import terminal

    _print_and_exit(terminal.models(url), as_json)


def _body(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: {error}") from None
    if not isinstance(body, dict):
        raise typer.BadParameter(f"{file} does not contain a JSON object")
    return body


def _print_and_exit(rows: AsyncIterator[dict[str, Any]], as_json: bool, *failing: str) -> None:
    from serve_app.cli import terminal

    try:
        code = terminal.print_rows(rows, as_json=as_json, failing=failing)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(code)
