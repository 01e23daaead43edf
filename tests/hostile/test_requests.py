"""Inputs 50 to 59: odd requests, apart from LoRAs and images. `test_index` lists tests in other folders."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.hostile.conftest import PROMPT, QUERY, Stage, request

ODD: dict[str, tuple[dict[str, Any], tuple[int, str] | None]] = {
    "50 frames of a picture": ({"num_frames": 1000, "fps": 120}, None),
    "53 30 MB of prompt": ({"prompt": PROMPT * 5_000_000}, (400, "PROMPT_TOO_LONG")),
    "53 NUL": ({"prompt": f"{PROMPT}\0"}, (422, "text_nul")),
    "53 escapes and a forged line": ({"prompt": f'{PROMPT}\x1b[31m\u202e\r\n{{"level": "ERROR"}}'}, None),
    "55 more tokens than the encoders take": ({"prompt": f"{PROMPT} " * 800}, None),
    "55 a negative prompt of many tokens": ({"neg": f"{PROMPT} " * 800}, None),
}


@pytest.mark.parametrize("name", ODD)
def test_prompts(stage: Stage, name: str) -> None:
    prompt, refusal = ODD[name]
    if refusal:
        assert stage.refused(request(prompt=prompt)) == refusal
    else:
        assert stage.outcome(request(prompt=prompt)) is None


def test_53_very_many_prompts(stage: Stage) -> None:
    one = request()
    for count, refusal in ((101, (400, "TOO_MANY_PROMPTS")), (5000, (422, "too_long"))):
        assert stage.refused(one | {"prompts": one["prompts"] * count}) == refusal


BODIES = {
    "53 a lone surrogate": b'{"model": "flux", "prompts": [{"prompt": "\\ud800"}]}',
    "54 deep nesting": b'{"a":' * 100_000,
    "54 a number without end": b'{"seed": ' + b"9" * 100_000 + b"}",
    "54 no UTF-8": b'{"model": "\xff"}',
    "54 compressed": b"\x1f\x8b\x08\x00",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(stage: Stage, name: str) -> None:
    before = stage.service.stored
    answer = stage.service.client.post(
        "/v1/inference", content=BODIES[name], headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, "json_invalid")
    assert stage.service.stored == before


def test_54_the_last_of_two_keys_counts(stage: Stage) -> None:
    """Validation and the worker see the same value, so a second key cannot bypass the check."""
    good, bad = json.dumps(request()), json.dumps(request("../outside.safetensors")["loras"])
    answer = stage.service.client.post(
        "/v1/inference",
        content=f'{good[:-1]}, "loras": {bad}}}',
        headers={"Content-Type": "application/json"},
    )
    assert answer.json()["detail"]["error"]["code"] == "LORA_PATH_NOT_ALLOWED"


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "PATCH"])
def test_59_outputs_cannot_be_overwritten(stage: Stage, method: str) -> None:
    stage.outcome(request())
    image = max(stage.folder.glob("outputs/*/*/*.jpg"), key=lambda path: path.stat().st_mtime)
    before, key = image.read_bytes(), image.relative_to(stage.folder / "outputs")
    client = stage.service.client
    assert client.request(method, f"/outputs/{key}{QUERY}", content=b"forged").status_code == 405
    assert image.read_bytes() == before == client.get(f"/outputs/{key}").content
