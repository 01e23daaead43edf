"""Tables of prompts: read rows, a data frame or a file, and make the requests of a grid."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from serve_app.wire.requests import InferenceRequest, PromptItem

Row = Mapping[str, Any]

Lora = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A path or URL, an item of `loras` as in a request, or several items for a model with two transformers."""

PROMPT_COLUMNS = frozenset(PromptItem.model_fields)

REQUEST_COLUMNS = frozenset(InferenceRequest.model_fields) - {"loras", "prompts"} - PROMPT_COLUMNS

COLUMNS = PROMPT_COLUMNS | REQUEST_COLUMNS | {"lora", "multiplier"}
"""Columns of a table: fields of a prompt and of a request, `lora`, and `multiplier` (-2..2)."""


def read_rows(table: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - checked below
    """Return the rows of a table without their empty cells.

    A table is a list of mappings, a pandas data frame, an Arrow table, or the path of a file: CSV with a
    header, or JSONL with one object per line. Raises `ValueError` for anything else and for invalid content,
    `OSError` if the file cannot be read.
    """
    if isinstance(table, str | Path):
        rows = _read_file(Path(table))
    elif hasattr(table, "to_pylist"):
        rows = table.to_pylist()
    elif hasattr(table, "to_dict"):
        # JSON has no numpy numbers, and pandas makes integers in a column with gaps floats.
        rows = table.astype(object).to_dict("records")
    else:
        rows = list(table) if isinstance(table, Iterable) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            "a table must be a list of mappings, a pandas or Arrow table, or a path to a .csv or .jsonl file"
        )
    return [{name: value for name, value in row.items() if not _empty(value)} for row in rows]


def requests_of(
    rows: Sequence[Row],
    *,
    loras: Sequence[Lora] = (),
    multipliers: Sequence[float] = (),
    seeds: Sequence[int] = (),
    **defaults: Any,  # noqa: ANN401 - any column
) -> list[dict[str, Any]]:
    """Return a request with one prompt for each row x LoRA x multiplier x seed; seeds vary fastest.

    If an axis is empty, the row's own `lora`, `multiplier` or `seed` is used. `defaults` are values for
    columns that a row does not have; None means no default. Unknown columns of a row are ignored. Raises
    `ValueError` for an unknown column in `defaults`.
    """
    if unknown := defaults.keys() - COLUMNS:
        raise ValueError(
            f"unknown columns: {', '.join(sorted(unknown))}; choose from {', '.join(sorted(COLUMNS))}"
        )
    requests = []
    for row in rows:
        full = {**{name: value for name, value in defaults.items() if not _empty(value)}, **row}
        axes = ("lora", loras), ("multiplier", multipliers), ("seed", seeds)
        given = [[(name, value) for value in values] for name, values in axes if values]
        requests += [_request({**full, **dict(cell)}) for cell in itertools.product(*given)]
    return requests


def _request(cell: Row) -> dict[str, Any]:
    lora, multiplier = cell.get("lora"), cell.get("multiplier")
    items: Sequence[Any] = () if lora is None else (lora,) if isinstance(lora, str | Mapping) else lora
    loras = [{"path": item} if isinstance(item, str) else dict(item) for item in items]
    if multiplier is not None:
        loras = [item | {"network_multiplier": multiplier} for item in loras]
    return {
        **{name: value for name, value in cell.items() if name in REQUEST_COLUMNS},
        "loras": loras,
        "prompts": [{name: value for name, value in cell.items() if name in PROMPT_COLUMNS}],
    }


def _empty(value: object) -> bool:
    """Return whether a cell is empty: None, NaN, or pandas' `NA` or `NaT`."""
    missing = type(value).__name__ in ("NAType", "NaTType")
    return value is None or missing or (isinstance(value, float) and math.isnan(value))


def _read_file(file: Path) -> list[dict[str, Any]]:
    suffix = file.suffix.lower()
    if suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as lines:
            # An empty cell counts as missing, so the default applies.
            return [{name: text for name, text in row.items() if text} for row in csv.DictReader(lines)]
    if suffix != ".jsonl":
        raise ValueError(f"{file.name}: a table must be a .csv or a .jsonl file")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file.name}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file.name}, line {number}: not an object")
            rows.append(row)
    return rows
