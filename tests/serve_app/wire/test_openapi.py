"""The OpenAPI description is complete and valid, and the running service conforms to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from cluster.failures import FailureCode
from serve_app.gateway.app import create_app
from serve_app.settings import GatewayArgs
from serve_app.wire.openapi import EXAMPLES
from serve_app.wire.refusals import Code
from tests.serve_app.conftest import png, rendering, save_pair, serving

CONFIG = Path(__file__).with_name("schemathesis.toml")

KEY = "Sg7alice-0123456789"

DESCRIPTION = create_app(GatewayArgs()).openapi()

SCHEMAS: dict[str, Any] = DESCRIPTION["components"]["schemas"]

OPERATIONS = [
    pytest.param(operation, id=f"{method.upper()} {path}")
    for path, methods in DESCRIPTION["paths"].items()
    for method, operation in methods.items()
]


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": DESCRIPTION["components"]})


def schema_of(content: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a body with its references resolved one level."""
    (media,) = content.values()
    schema = media["schema"]
    return SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def errors_of(operation: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield status and JSON of each error, except FastAPI's own 422, which has no codes."""
    for status, response in operation["responses"].items():
        media = response.get("content", {}).get("application/json", {})
        if int(status) >= 400 and media["schema"] != {"$ref": "#/components/schemas/HTTPValidationError"}:
            yield int(status), media


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_says_what_it_does(operation: dict[str, Any]) -> None:
    assert operation["summary"] and operation["description"]
    for parameter in operation.get("parameters", []):
        assert parameter["description"], parameter["name"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_body_describes_its_fields(operation: dict[str, Any]) -> None:
    if "requestBody" not in operation:
        return
    schema = schema_of(operation["requestBody"]["content"])
    assert schema["description"]
    for name, field in schema["properties"].items():
        assert field.get("description"), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_json_bodies_have_an_example(operation: dict[str, Any]) -> None:
    bodies = [operation.get("requestBody", {})]
    bodies += [body for status, body in operation["responses"].items() if int(status) < 300]
    for body in bodies:
        content = body.get("content", {})
        if set(content) == {"application/json"}:
            schema = schema_of(content)
            assert schema["examples"]
            for example in schema["examples"]:
                validator(schema).validate(example)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_error_has_a_schema_with_its_codes(operation: dict[str, Any]) -> None:
    statuses = {code.name: code.status for code in Code}
    errors = dict(errors_of(operation))
    assert 500 in errors
    for status, media in errors.items():
        assert media["examples"]
        for code, example in media["examples"].items():
            validator(media["schema"]).validate(example["value"])
            unknown = json.dumps(example["value"]).replace(f'"{code}"', '"NO_SUCH_CODE"')
            assert not validator(media["schema"]).is_valid(json.loads(unknown))
            # A job's failure codes have no HTTP status; OpenAI's routes give them one.
            assert statuses.get(code) == status or code in set(FailureCode)


def test_the_document_is_consistent() -> None:
    operations = [each for methods in DESCRIPTION["paths"].values() for each in methods.values()]
    names = Counter(operation["operationId"] for operation in operations)
    assert set(names.values()) == {1}
    assert set(EXAMPLES) <= set(SCHEMAS)
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)
    links = [
        link["operationId"]
        for operation in operations
        for response in operation["responses"].values()
        for link in response.get("links", {}).values()
    ]
    assert links and set(links) <= set(names)


@pytest.mark.slow
def test_the_service_keeps_to_its_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS", KEY)
    monkeypatch.setenv("SECRET_KEY", "Sg7secret-0123456789-0123456789-01")
    with serving(tmp_path) as service, rendering(service):
        save_pair(tmp_path / "loras" / "my_style.safetensors")  # The examples use it.
        service.store.put("example/0.png", png(), "image/png")
        run = [Path(sys.executable).with_name("st"), "--config-file", str(CONFIG), "run"]
        done = subprocess.run(
            [*run, f"{service.client.base_url}/openapi.json", "-H", f"Authorization: Bearer {KEY}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
