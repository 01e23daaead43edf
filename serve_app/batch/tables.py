"""Tables of prompts: from rows, a data frame or a file to the requests of a grid."""

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
"""A path or URL; or an item of `loras` as in a request; or several, for a model with two transformers."""

PROMPT_COLUMNS = frozenset(PromptItem.model_fields)

REQUEST_COLUMNS = frozenset(InferenceRequest.model_fields) - {"loras", "prompts"} - PROMPT_COLUMNS

COLUMNS = PROMPT_COLUMNS | REQUEST_COLUMNS | {"lora", "multiplier"}
"""What a table may say: fields of a prompt and of a request, and its LoRA with its weight (-2..2)."""


def read_rows(table: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - judged below
    """Return the rows of a table, what is empty in them left out.

    A table is a list of mappings, a pandas data frame, an Arrow table, or the path of a file: CSV with a
    header, or JSONL with an object per line. Raises `ValueError` for anything else and for a file that is not
    what its name says, `OSError` for one that cannot be read.
    """
    if isinstance(table, str | Path):
        rows = _read_file(Path(table))
    elif hasattr(table, "to_pylist"):
        rows = table.to_pylist()
    elif hasattr(table, "to_dict"):
        # As objects first: numpy's numbers are no JSON, and an integer beside a gap would be a float.
        rows = table.astype(object).to_dict("records")
    else:
        rows = list(table) if isinstance(table, Iterable) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            "a table is a list of mappings, a pandas or Arrow table, or the path of a .csv or .jsonl"
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
    """Return a request of one prompt for each row x LoRA x multiplier x seed, the last one fastest.

    An axis that is empty has the row's own `lora`, `multiplier` or `seed`; `defaults` are columns for rows
    that do not have them, None for none. Columns that no request has are left out. Raises `ValueError` for a
    default that is no column.
    """
    if unknown := defaults.keys() - COLUMNS:
        raise ValueError(
            f"no such column: {', '.join(sorted(unknown))}; there are {', '.join(sorted(COLUMNS))}"
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
    """Tell whether a cell holds nothing: None, NaN, or what pandas has for other types."""
    missing = type(value).__name__ in ("NAType", "NaTType")
    return value is None or missing or (isinstance(value, float) and math.isnan(value))


def _read_file(file: Path) -> list[dict[str, Any]]:
    suffix = file.suffix.lower()
    if suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as lines:
            # A cell without text says nothing: its default holds.
            return [{name: text for name, text in row.items() if text} for row in csv.DictReader(lines)]
    if suffix != ".jsonl":
        raise ValueError(f"{file.name}: a table is a .csv or a .jsonl file")
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
