"""docs/api.md matches the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.failures import FailureCode
from cluster.jobs.model import JobState, Phase
from serve_app.wire.answers import ModelAnswer, StatusAnswer
from serve_app.wire.refusals import Code
from serve_app.wire.requests import InferenceRequest, LoraItem, PromptItem

TEXT = (Path(__file__).parents[3] / "docs" / "api.md").read_text()


@pytest.mark.parametrize("code", Code)
def test_every_refusal_is_documented_with_its_status(code: Code) -> None:
    assert re.search(rf"^\| `{code.name}` \| {code.status} \|", TEXT, re.MULTILINE)


def test_the_codes_come_in_the_order_of_the_checks() -> None:
    documented = re.findall(r"^\| `([A-Z_]+)` \| \d+ \|", TEXT, re.MULTILINE)
    assert documented == [code.name for code in Code]


def test_every_failure_code_state_phase_and_field_is_named() -> None:
    fields = {*InferenceRequest.model_fields, *LoraItem.model_fields, *PromptItem.model_fields}
    fields |= {*StatusAnswer.model_fields, *ModelAnswer.model_fields} - {"request_id", "created_at"}
    for name in (*FailureCode, *JobState, *Phase, *fields):
        assert f"`{name}`" in TEXT, name
