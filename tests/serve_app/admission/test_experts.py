"""Requests for models with two transformers, in the order of the reference server's checks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve_app.conftest import Service, base64_png, body
from tests.serve_app.wire.test_refusals import refused

STYLE = "style.safetensors"


def request(*loras: dict[str, Any]) -> dict[str, Any]:
    return body(model="wan22_14b_t2v", loras=list(loras))


def lora(transformer: str | None, path: str = STYLE) -> dict[str, Any]:
    return {"path": path, "transformer": transformer}


@pytest.mark.parametrize(
    ("loras", "code"),
    [
        ((), "LORA_FILE_REQUIRED"),
        ((lora(None),), "MOE_FORMAT_REQUIRED"),
        ((lora("low"), lora(None)), "MOE_FORMAT_REQUIRED"),
        ((lora("low"), lora("low"), lora(None)), "MOE_FORMAT_REQUIRED"),
        ((lora("low"), lora("low")), "SINGLE_MOE_CONFIG_ONLY"),
        ((lora("low"), lora("high"), lora("low")), "SINGLE_MOE_CONFIG_ONLY"),
        ((lora("low", "no.safetensors"), lora("low", "no.safetensors")), "SINGLE_MOE_CONFIG_ONLY"),
        ((lora("low", "no.safetensors"), lora("high", "../x.safetensors")), "LORA_PATH_NOT_ALLOWED"),
    ],
)
def test_refusals(service: Service, loras: tuple[dict[str, Any], ...], code: str) -> None:
    found, details, status = refused(service, request(*loras))
    assert (found, status) == (code, 400)
    if code.startswith(("MOE", "SINGLE")):
        assert details["loras"] == [{**one, "network_multiplier": None} for one in loras]


@pytest.mark.parametrize("high", [STYLE, "nor_this.safetensors"])
def test_all_missing_files_are_named(service: Service, high: str) -> None:
    found, details, _ = refused(service, request(lora("low", "no.safetensors"), lora("high", high)))
    missing = ["no.safetensors"] if high == STYLE else ["no.safetensors", high]
    assert (found, details) == ("LORA_NOT_FOUND", {"missing_files": missing})


def test_missing_files_come_before_missing_images(service: Service) -> None:
    asked = request(lora("low", "no.safetensors")) | {"model": "wan22_14b_i2v"}
    assert refused(service, asked)[0] == "LORA_NOT_FOUND"
    assert refused(service, request(lora("low")) | {"model": "wan22_14b_i2v"})[0] == "CONTROL_IMAGE_REQUIRED"


@pytest.mark.parametrize("experts", [("low",), ("high",), ("low", "high"), ("high", "low")])
def test_either_or_both_are_taken(fresh: Service, experts: tuple[str, ...]) -> None:
    weighted = [{**lora(expert), "network_multiplier": 0.5} for expert in experts]
    claim = fresh.claim(fresh.submit(request(*weighted)))
    stored = [(one["transformer"], one["multiplier"]) for one in claim.job.spec["loras"]]
    assert stored == [(expert, 0.5) for expert in experts]


def test_one_that_takes_an_image_or_none_ignores_several(fresh: Service) -> None:
    """The reference server does the same and uses only the text."""

    def controls(**images: str) -> tuple[int, list[str]]:
        answer = fresh.post(body(model="wan22_5b", prompt=images))
        claim = fresh.claim(answer.json()["request_id"])
        return len(claim.job.spec["prompts"][0]["controls"]), answer.json()["warnings"]

    one, other = base64_png(), base64_png(32, 32)
    assert controls() == (0, [])
    assert controls(ctrl_img=one) == controls(ctrl_img_2=one, ctrl_img=other) == (1, [])
    warning = "Control images were ignored: wan22_5b takes at most 1 per prompt."
    assert controls(ctrl_img_1=one, ctrl_img_2=other) == (0, [warning])
