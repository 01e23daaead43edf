"""How /openapi.json describes the errors of a route: their status, codes and examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any, TypeAlias

from pydantic import BaseModel

from serve_app.wire.refusals import Code, Error, ErrorAnswer

Responses: TypeAlias = dict[int | str, dict[str, Any]]
"""The type of FastAPI's `responses` of a route."""


def documented(*codes: Code) -> Responses:
    """Return the OpenAPI description of a route's refusals."""
    refusals = [(code.status, Error(code=code.name, message=code.message, details={})) for code in codes]
    return described(ErrorAnswer, ("detail", "error"), refusals)


def described(
    model: type[BaseModel], path: Sequence[str], errors: Iterable[tuple[int, BaseModel]]
) -> Responses:
    """Describe errors by status, with codes and examples. A body of `model` holds its error at `path`."""
    schema_path = [key for name in (*path, "code") for key in ("properties", name)]
    by_status: dict[int, dict[str, Any]] = {}
    for status, error in errors:
        fields = error.model_dump()
        by_status.setdefault(status, {})[fields["code"]] = {"value": _nested(path, fields)}
    return {
        status: {
            "model": model,
            "description": HTTPStatus(status).phrase,
            "content": {
                "application/json": {
                    "schema": _nested(schema_path, {"enum": list(examples)}),
                    "examples": examples,
                }
            },
        }
        for status, examples in by_status.items()
    }


def _nested(path: Sequence[str], leaf: Any) -> Any:  # noqa: ANN401 - any JSON
    """Return `leaf` wrapped in one object for each name of `path`."""
    return {path[0]: _nested(path[1:], leaf)} if path else leaf
