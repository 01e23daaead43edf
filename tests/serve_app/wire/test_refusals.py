"""Every refusal: its code, status and details, the order of the checks, and that nothing was stored.

`tests/hostile` covers the refusals of hostile files, URLs and images.
"""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from deployments.catalog import CATALOG
from tests.serve_app.conftest import Service, base64_png, body, kontext_body, png, serving

SECRET = "Sg7secret"

TWO_LORAS = [{"path": "style.safetensors"}, {"path": f"https://me:{SECRET}@host/b?sig={SECRET}"}]

MODEL_RULES: dict[str, dict[str, Any]] = {
    "MODEL_NOT_FOUND": {"model": "flux9"},
    "LORA_FILE_REQUIRED": {"loras": []},
    "MOE_FORMAT_NOT_SUPPORTED": {"loras": [{**lora, "transformer": "low"} for lora in TWO_LORAS]},
    "SINGLE_LORA_ONLY": {"loras": [{"path": "missing.safetensors"}, {"path": "style.safetensors"}]},
    "LORA_NOT_FOUND": {"loras": [{"path": "missing.safetensors"}]},
    "CONTROL_IMAGE_REQUIRED": {"model": "flux_kontext"},
}
"""Changes that break each rule, in the order of the checks."""

OTHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("TOO_MANY_PROMPTS", body(prompts=[{"prompt": "a"}] * 101), {"prompts": 101, "most": 100}),
    ("PROMPT_TOO_LONG", body(prompt={"prompt": "a" * 10_001}), {"prompt_index": 0, "most": 10_000}),
    ("PROMPT_TOO_LONG", body(prompt={"neg": "a" * 10_001}), {"prompt_index": 0, "most": 10_000}),
    ("PROMPT_TOO_LONG", body(trigger_word="a" * 10_001), {"prompt_index": 0, "most": 10_000}),
    (
        "PROMPT_TOO_LONG",
        body(prompts=[{"prompt": "a"}, {"prompt": "[trigger]" * 1000}], trigger_word="eleven char"),
        {"prompt_index": 1, "most": 10_000},
    ),
    ("RESOLUTION_NOT_SUPPORTED", body(prompt={"resolution": "High"}), {"model": "flux", "prompt_index": 0}),
    ("SECRET_KEY_REQUIRED", body(hf_token=SECRET), {}),
    (
        "OUTPUT_FORMAT_NOT_SUPPORTED",
        body(output_format="mp4"),
        {"model": "flux", "supported": ["jpeg", "png", "webp"]},
    ),
    (
        "OUTPUT_FORMAT_NOT_SUPPORTED",
        body(model="wan21_1b", output_format="png"),
        {"model": "wan21_1b", "supported": ["webp", "mp4"]},
    ),
    (
        "TOO_MANY_CONTROL_IMAGES",
        kontext_body(ctrl_img_1=base64_png(), ctrl_img_3=base64_png()),
        {"model": "flux_kontext", "prompt_index": 0, "most": 1},
    ),
]


def refused(service: Service, request: dict[str, Any]) -> tuple[str, dict[str, Any], int]:
    """Post a request that must be refused with one of our errors; check that nothing was stored."""
    before = service.stored
    answer = service.post(request)
    assert service.stored == before
    assert SECRET not in answer.text
    error = answer.json()["detail"]["error"]
    assert set(answer.json()["detail"]) == {"error"}
    assert set(error) == {"code", "message", "details"}
    assert error["message"].endswith(".")
    return error["code"], error["details"], answer.status_code


@pytest.mark.parametrize("code", MODEL_RULES)
def test_each_rule_of_the_models(service: Service, code: str) -> None:
    found, details, status = refused(service, body(**MODEL_RULES[code]))
    assert (found, status) == (code, 400)
    match code:
        case "MODEL_NOT_FOUND":
            assert details == {"supported_models": list(CATALOG)}
        case "LORA_FILE_REQUIRED":
            assert details == {"loras": []}
        case "MOE_FORMAT_NOT_SUPPORTED":
            assert details["loras"][0] == {
                "path": "style.safetensors",
                "transformer": "low",
                "network_multiplier": None,
            }
            assert details["loras"][1]["path"] == "https://***"
        case "SINGLE_LORA_ONLY":
            assert [lora["path"] for lora in details["loras"]] == ["missing.safetensors", "style.safetensors"]
        case "LORA_NOT_FOUND":
            assert details["lora_path"] == "missing.safetensors"
        case "CONTROL_IMAGE_REQUIRED":
            assert details == {"model": "flux_kontext", "prompt_index": 0}


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(MODEL_RULES, 2)])
def test_of_two_broken_rules_the_first_answers(service: Service, first: str, second: str) -> None:
    request = body(**MODEL_RULES[second] | MODEL_RULES[first])
    assert refused(service, request)[0] == first


@pytest.mark.parametrize("first", MODEL_RULES)
@pytest.mark.parametrize("ours", range(len(OTHERS)), ids=[code for code, _, _ in OTHERS])
def test_the_rules_of_the_reference_come_before_our_bounds(service: Service, first: str, ours: int) -> None:
    request = OTHERS[ours][1] | MODEL_RULES[first]
    if first == "CONTROL_IMAGE_REQUIRED":
        request["prompts"] = [*request["prompts"], {"prompt": "no image"}]
    assert refused(service, request)[0] == first


@pytest.mark.parametrize(("code", "request_body", "details"), OTHERS, ids=[code for code, _, _ in OTHERS])
def test_our_bounds(
    service: Service, code: str, request_body: dict[str, Any], details: dict[str, Any]
) -> None:
    assert refused(service, request_body) == (code, details, 400)


@pytest.mark.parametrize("place", ["lora", "control image"])
def test_a_query_is_not_stored_in_clear(service: Service, place: str) -> None:
    url = f"https://files.example/a.safetensors?sig={SECRET}"
    request = body(lora={"path": url}) if place == "lora" else kontext_body(ctrl_img=url)
    assert refused(service, request) == ("SECRET_KEY_REQUIRED", {}, 400)


@pytest.mark.parametrize("sha256", ["", "a" * 63, "g" * 64, "a" * 65])
def test_a_hash_has_its_form(service: Service, sha256: str) -> None:
    assert service.post(body(lora={"sha256": sha256})).status_code == 422


def test_what_is_no_intact_safetensors_file_is_refused(service: Service) -> None:
    (service.settings.loras / "page.safetensors").write_bytes(b"<!DOCTYPE html>")
    code, details, status = refused(service, body(lora={"path": "page.safetensors"}))
    assert (code, status) == ("LORA_FORMAT_NOT_SUPPORTED", 400)
    assert details == {
        "lora_path": "page.safetensors",
        "reason": "The LoRA file is not safetensors but a web page.",
    }


@pytest.mark.parametrize("path", ["", ".", "style", "style.safetensors/x", "a" * 300, "x/y/z.safetensors"])
def test_a_path_that_names_no_lora(service: Service, path: str) -> None:
    code, details, status = refused(service, body(lora={"path": path}))
    # The root itself exists, but it is not a file.
    assert code == ("LORA_FORMAT_NOT_SUPPORTED" if path in ("", ".") else "LORA_NOT_FOUND")
    assert (details["lora_path"], status) == (path, 400)


def test_paths_inside_the_root_are_taken_in_every_form(service: Service) -> None:
    root = service.settings.loras
    (root / "deep").mkdir()
    (root / "deep" / "link.safetensors").symlink_to(root / "style.safetensors")
    for path in (
        "./style.safetensors",
        "deep/../style.safetensors",
        "deep/link.safetensors",
        f"{root}/style.safetensors",
    ):
        assert service.post(body(lora={"path": path})).status_code == 200, path


@pytest.mark.parametrize(
    ("image", "code"),
    [("@@@", "CONTROL_IMAGE_INVALID"), (base64_png(8192, 4097), "CONTROL_IMAGE_TOO_LARGE")],
    ids=["garbage", "large"],
)
def test_a_bad_control_image_is_named_by_its_prompt(service: Service, image: str, code: str) -> None:
    request = kontext_body()
    request["prompts"].append({"prompt": "second", "ctrl_img": image})
    found, details, status = refused(service, request)
    assert (found, status, details["prompt_index"]) == (code, 400, 1)


@pytest.mark.parametrize("size", [(63, 100), (100, 63), (64, 513), (1100, 100)])
def test_a_control_image_of_a_shape_that_flux2_does_not_take(service: Service, size: tuple[int, int]) -> None:
    images = {"ctrl_img_1": base64_png(64, 512), "ctrl_img_2": base64_png(*size)}
    assert refused(service, body(model="flux2_klein_4b", prompt=images)) == (
        "CONTROL_IMAGE_SHAPE",
        {"prompt_index": 0, "least_side": 64, "most_aspect": 8},
        400,
    )


def test_a_control_image_too_narrow_for_the_model_is_refused(service: Service) -> None:
    def request(width: int, height: int) -> dict[str, Any]:
        image = base64.b64encode(png(width, height)).decode()
        return {**kontext_body(), "model": "qwen_image_edit", "prompts": [{"prompt": "x", "ctrl_img": image}]}

    for size in ((1510, 10), (10, 1510)):
        code, details, status = refused(service, request(*size))
        assert (code, status) == ("CONTROL_IMAGE_SHAPE", 400)
        assert details == {"prompt_index": 0, "least_side": 1, "most_aspect": 150}
    assert service.post(request(10, 1500)).status_code == 200


def test_a_prompt_without_image_is_named_by_its_index(service: Service) -> None:
    request = kontext_body()
    request["prompts"] += [{"prompt": "b", "ctrl_img_2": base64_png()}, {"prompt": "c", "ctrl_img": ""}]
    assert refused(service, request) == (
        "CONTROL_IMAGE_REQUIRED",
        {"model": "flux_kontext", "prompt_index": 2},
        400,
    )


def test_a_refusal_is_json_whatever_the_path_holds(service: Service) -> None:
    path = "\u202e\x1b[31m\r\n\U0001f98a.safetensors"
    answer = service.post(body(lora={"path": path}))
    assert json.loads(answer.text)["detail"]["error"]["details"]["lora_path"] == path


def test_more_loras_where_the_operator_allows_them(tmp_path: Path) -> None:
    two = [{"path": "style.safetensors", "network_multiplier": 0.5}, {"path": "style.safetensors"}]
    with serving(tmp_path, max_loras={"flux": 2}) as service:
        job = service.queue.get(service.submit(body(loras=two)))
        assert job is not None
        assert [lora["multiplier"] for lora in job.spec["loras"]] == [0.5, 1.0]
        code, details, status = refused(service, body(loras=[*two, two[0]]))
        assert (code, status, len(details["loras"])) == ("TOO_MANY_LORAS", 400, 3)
        assert (
            refused(service, body(loras=[*two[:1], {"path": "missing.safetensors"}]))[0] == "LORA_NOT_FOUND"
        )
        assert refused(service, body(model="sdxl", loras=two))[0] == "SINGLE_LORA_ONLY"
        models = {row["id"]: row["max_loras"] for row in service.client.get("/v1/models").json()["models"]}
        assert (models["flux"], models["sdxl"]) == (2, 1)
