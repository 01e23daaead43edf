"""Types and bounds of the request body, and clean errors for everything else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve_app.conftest import Service, base64_png, body

ACCEPTED = [
    {"width": 64},
    {"width": 4096},
    {"width": "1024"},
    {"width": 1024.0},
    {"height": None},
    {"guidance_scale": 0},
    {"guidance_scale": "20"},
    {"sample_steps": 150},
    {"seed": -1},
    {"seed": 2**64 - 1},
    {"neg": None},
    {"sampler": "flowmatch"},
    {"num_frames": 1000, "fps": 120},
    {"resolution": "Default"},
    {"prompt": ""},
    {"prompt": "\u202e\x1b[31mred\r\nINFO forged \U0001f98a"},
    {"trigger_word": None},
]

REFUSED = [
    ("width", 63, "greater_than_equal"),
    ("width", 4097, "less_than_equal"),
    ("width", 0, "greater_than_equal"),
    ("width", -1, "greater_than_equal"),
    ("width", 1e9, "less_than_equal"),
    ("width", 1024.5, "int_from_float"),
    ("width", "wide", "int_parsing"),
    ("width", [1024], "int_type"),
    ("height", 63, "greater_than_equal"),
    ("guidance_scale", 20.5, "less_than_equal"),
    ("guidance_scale", -0.1, "greater_than_equal"),
    ("guidance_scale", "NaN", "finite_number"),
    ("guidance_scale", "Infinity", "finite_number"),
    ("sample_steps", 0, "greater_than_equal"),
    ("sample_steps", 10**6, "less_than_equal"),
    ("seed", -2, "greater_than_equal"),
    ("seed", 2**64, "less_than"),
    ("num_frames", 0, "greater_than_equal"),
    ("fps", 121, "less_than_equal"),
    ("resolution", "Medium", "literal_error"),
    ("prompt", None, "string_type"),
    ("prompt", 5, "string_type"),
    ("prompt", "a\x00b", "text_nul"),
    ("neg", "a\x00b", "text_nul"),
    ("trigger_word", "a\x00b", "text_nul"),
    ("ctrl_img", 5, "string_type"),
]

REFUSED_ELSEWHERE: list[tuple[dict[str, Any], list[Any], str]] = [
    (body(lora={"network_multiplier": 2.1}), ["loras", 0, "network_multiplier"], "less_than_equal"),
    (body(lora={"network_multiplier": -2.1}), ["loras", 0, "network_multiplier"], "greater_than_equal"),
    (body(lora={"network_multiplier": "nan"}), ["loras", 0, "network_multiplier"], "finite_number"),
    (body(lora={"transformer": "mid"}), ["loras", 0, "transformer"], "literal_error"),
    (body(lora={"path": None}), ["loras", 0, "path"], "string_type"),
    (body(lora={"path": "style\x00.safetensors"}), ["loras", 0, "path"], "text_nul"),
    (body(lora={"path": "a" * 4097}), ["loras", 0, "path"], "string_too_long"),
    (body(loras=None), ["loras"], "list_type"),
    (body(loras=["style.safetensors"]), ["loras", 0], "model_attributes_type"),
    (body(loras=[{"path": "a"}] * 1001), ["loras"], "too_long"),
    (body(prompts=[]), ["prompts"], "too_short"),
    (body(prompts=[{"prompt": "a"}] * 1001), ["prompts"], "too_long"),
    (body(model=None), ["model"], "string_type"),
    (body(kv_cache="perhaps"), ["kv_cache"], "bool_parsing"),
    (body(output_format="tiff"), ["output_format"], "literal_error"),
]

NOT_JSON = [
    b"",
    b"{",
    b"\xff\xfe",
    b'{"model": NaN}',
    b'{"prompts": [{"prompt": "a", "guidance_scale": Infinity}]}',
    b'{"prompts": [{"prompt": "\\ud800"}]}',
    b'{"\\udfff": 1}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"seed": ' + b"9" * 10_000 + b"}",
]


def _invalid(service: Service, content: bytes) -> list[dict[str, Any]]:
    before = service.stored
    answer = service.client.post(
        "/v1/inference", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422, answer.text
    assert service.stored == before
    return answer.json()["detail"]


@pytest.mark.parametrize("prompt", ACCEPTED, ids=str)
def test_lax_types_and_bounds_are_those_of_the_reference(service: Service, prompt: dict[str, Any]) -> None:
    answer = service.post(body(prompt=prompt))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("field", "value", "kind"), REFUSED, ids=str)
def test_a_bad_prompt_field_is_a_422_that_names_it(
    service: Service, field: str, value: object, kind: str
) -> None:
    errors = _invalid(service, json.dumps(body(prompt={field: value})).encode())
    assert [(error["loc"], error["type"]) for error in errors] == [(["body", "prompts", 0, field], kind)]
    assert errors[0]["msg"]


@pytest.mark.parametrize(
    ("request_body", "location", "kind"), REFUSED_ELSEWHERE, ids=lambda value: str(value)[:40]
)
def test_a_bad_field_elsewhere_is_a_422_that_names_it(
    service: Service, request_body: dict[str, Any], location: list[Any], kind: str
) -> None:
    errors = _invalid(service, json.dumps(request_body).encode())
    assert [(error["loc"], error["type"]) for error in errors] == [(["body", *location], kind)]


@pytest.mark.parametrize("field", ["model", "loras", "prompts"])
def test_a_required_field_that_is_absent_is_a_422(service: Service, field: str) -> None:
    request = body()
    del request[field]
    errors = _invalid(service, json.dumps(request).encode())
    assert [(error["loc"], error["type"]) for error in errors] == [(["body", field], "missing")]


@pytest.mark.parametrize("content", NOT_JSON, ids=lambda content: repr(content[:24]))
def test_what_is_no_strict_json_is_a_422(service: Service, content: bytes) -> None:
    assert _invalid(service, content)[0]["loc"][0] == "body"


def test_errors_echo_numbers_but_never_text(service: Service) -> None:
    secret = "hf_" + "Zz9" * 8
    bad = body(
        hf_token=[secret],
        output_format=secret,
        prompt={"width": 5, "height": 1e308, "seed": secret, "prompt": secret + "\x00"},
        lora={"path": "https://host/x?signature=" + secret * 200},
    )
    errors = _invalid(service, json.dumps(bad).replace("1e+308", "1e999").encode())
    assert secret not in str(errors)
    by_field = {error["loc"][-1]: error for error in errors}
    assert by_field["width"]["input"] == 5
    assert by_field["width"]["ctx"] == {"ge": 64}
    # Infinity is not valid JSON.
    assert "input" not in by_field["height"]
    assert "input" not in by_field["hf_token"]


def test_the_last_of_duplicate_keys_counts(service: Service) -> None:
    text = json.dumps(body()).replace('"prompt": "a red fox"', '"prompt": "a", "seed": 1, "seed": 7')
    answer = service.client.post("/v1/inference", content=text, headers={"Content-Type": "application/json"})
    job = service.queue.get(answer.json()["request_id"])
    assert job is not None
    assert job.spec["prompts"][0]["seed"] == 7


def test_unknown_fields_are_ignored_and_named(service: Service) -> None:
    request = body(
        priority={"deep": [1] * 50}, lora={"scale": 2}, prompt={"steps": 5, "loras": "\x1b[31m", "x\x00y": 1}
    )
    answer = service.post(request)
    assert answer.status_code == 200
    (warning,) = answer.json()["warnings"]
    for name in (
        "'priority'",
        "'loras[0].scale'",
        "'prompts[0].steps'",
        "'prompts[0].loras'",
        "prompts[0].x\\x00y",
    ):
        assert name in warning
    assert service.result(answer.json()["request_id"])["metadata"]["warnings"] == [warning]


def test_a_flood_of_unknown_fields_is_named_in_short(service: Service) -> None:
    answer = service.post(body(**{f"{index}" + "x" * 500: index for index in range(500)}))
    (warning,) = answer.json()["warnings"]
    assert "and 480 more" in warning
    assert len(warning) < 2000


def test_known_fields_bring_no_warning(service: Service) -> None:
    request = body(
        trigger_word="fox",
        kv_cache=True,
        match_target_res=False,
        hf_token="",
        output_format="webp",
        lora={"network_multiplier": 1, "transformer": None},
        prompt={
            "sampler": "x",
            "num_frames": 1,
            "fps": 1,
            "resolution": "Default",
            "neg": "",
            "ctrl_img": "",
        },
    )
    assert service.post(request).json()["warnings"] == []


def test_control_images_for_a_model_without_are_ignored_with_a_warning(service: Service) -> None:
    before = service.stored[1]
    answer = service.post(body(prompt={"ctrl_img": base64_png(), "ctrl_img_1": "http://169.254.169.254/"}))
    assert answer.json()["warnings"] == ["Control images were ignored: flux takes none."]
    assert service.stored[1] == before
