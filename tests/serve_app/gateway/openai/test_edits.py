"""`POST /v1/images/edits`, called by the real `openai` package, or by hand for forms that it cannot send."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import openai
import pytest

from cluster.objects.store import content_key
from tests.serve_app.conftest import Service, png, rendering, serving
from tests.serve_app.gateway.openai.conftest import LORAS, prompts

RED, BLUE = png(48, 32, (200, 0, 0)), png(32, 48, (0, 0, 200))


def test_one_image(service: Service, client: openai.OpenAI) -> None:
    ours = {**LORAS, "stream": False, "seed": 7, "sample_steps": 4, "trigger_word": "p5x"}
    with rendering(service, "flux_kontext") as claimed:
        answer = client.images.edit(
            model="flux_kontext",
            image=("photo.png", io.BytesIO(RED)),
            prompt="[trigger], make it winter",
            n=2,
            size="128x64",
            response_format="b64_json",
            extra_body=ours,
        )
    (job,) = claimed
    for seed, prompt in enumerate(prompts(job), 7):
        assert prompt["controls"] == [content_key(RED)]
        assert (prompt["seed"], prompt["steps"], prompt["prompt"]) == (seed, 4, "p5x, make it winter")
        assert (prompt["width"], prompt["height"]) == (128, 64)
    assert service.store.get(content_key(RED)) == RED
    (lora,) = job.spec["loras"]
    assert (lora["path"], lora["multiplier"]) == ("style.safetensors", 0.8)
    assert answer.data is not None and len(answer.data) == 2 and answer.data[0].b64_json


def test_several_images_keep_their_order(service: Service, client: openai.OpenAI) -> None:
    with rendering(service, "qwen_image_edit_plus") as claimed:
        client.images.edit(
            model="qwen_image_edit_plus", image=[RED, BLUE], prompt="put them together", extra_body=LORAS
        )
    assert prompts(claimed[0])[0]["controls"] == [content_key(RED), content_key(BLUE)]


@pytest.mark.parametrize(
    "loras",
    [
        {"loras": json.dumps([{"path": "style.safetensors", "network_multiplier": -1}])},
        {"loras": json.dumps({"path": "style.safetensors", "network_multiplier": -1})},
        {"loras[][path]": "style.safetensors", "loras[][network_multiplier]": "-1"},
    ],
)
def test_forms_that_others_send(service: Service, loras: dict[str, str]) -> None:
    with rendering(service, "flux_kontext") as claimed:
        answer = service.client.post(
            "/v1/images/edits",
            data={"model": "flux_kontext", "prompt": "winter", **loras},
            files={"image[]": ("photo.png", RED, "image/png")},
        )
    assert answer.status_code == 200, answer.text
    assert claimed[0].spec["loras"][0]["multiplier"] == -1


def test_several_loras_come_field_by_field(tmp_path: Any) -> None:
    loras = [
        {"path": "style.safetensors", "network_multiplier": 0.5},
        {"path": "style.safetensors", "network_multiplier": 1.5},
    ]
    with (
        serving(tmp_path, max_loras={"flux_kontext": 2}) as service,
        openai.OpenAI(base_url=f"{service.client.base_url}/v1", api_key="unused") as client,
        rendering(service, "flux_kontext") as jobs,
    ):
        client.images.edit(model="flux_kontext", image=RED, prompt="w", extra_body={"loras": loras})
        del loras[0]["network_multiplier"]
        with pytest.raises(openai.UnprocessableEntityError, match="send JSON"):
            client.images.edit(model="flux_kontext", image=RED, prompt="w", extra_body={"loras": loras})
    assert [lora["multiplier"] for lora in jobs[0].spec["loras"]] == [0.5, 1.5]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "flux"}, "TOO_MANY_CONTROL_IMAGES"),
        ({"image": [RED, BLUE]}, "TOO_MANY_CONTROL_IMAGES"),
        ({"image": b"no picture"}, "CONTROL_IMAGE_INVALID"),
        ({"image": RED[:60]}, "CONTROL_IMAGE_INVALID"),
        ({"model": "ltx2"}, "IMAGE_MODEL_REQUIRED"),
        ({"model": "none"}, "MODEL_NOT_FOUND"),
    ],
)
def test_refusals(service: Service, client: openai.OpenAI, changes: dict[str, Any], code: str) -> None:
    before = service.stored
    request: dict[str, Any] = {"model": "flux_kontext", "image": RED, "prompt": "winter", "extra_body": LORAS}
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**request | changes)
    assert caught.value.code == code
    assert service.stored == before


def send(service: Service, fields: dict[str, Any], files: Any = None, **options: Any) -> httpx.Response:
    files = [("image", ("photo.png", RED))] if files is None else files
    request = {"model": "flux_kontext", "prompt": "winter", "loras": json.dumps(LORAS["loras"]), **fields}
    return service.client.post("/v1/images/edits", data=request, files=files, **options)


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"loras": "[{"}, None, ""),
        ({"loras": "3", "loras[][path]": "x"}, None, ""),
        ({"loras": '["x"]', "loras[][path]": "x"}, None, ""),
        ({"webhook": "x", "webhook[url]": "x"}, None, ""),
        ({"webhook": "3", "webhook[][url]": "x"}, None, ""),
        ({"webhook[url]": "x", "webhook[events][]": "never"}, None, "webhook.events.0"),
        ({"seed[x]": "1"}, None, "seed"),
        ({"n": "many"}, None, "n"),
        ({}, [("picture", ("photo.png", RED))], "image"),
        ({}, [("image", ("photo.png", RED)), ("mask", ("mask.png", RED))], "mask"),
        ({}, [("image", ("photo.png", RED))] * 4, "image"),
        ({}, [("image", ("photo.png", RED))] * 17, ""),
        ({f"field{i}": "x" for i in range(101)}, None, ""),
        ({"prompt": "x" * (2**20 + 1)}, None, ""),
    ],
)
def test_bad_forms(service: Service, fields: dict[str, str], files: Any, param: str) -> None:
    before = service.stored
    answer = send(service, fields, files)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "FIELD_INVALID", param)
    assert service.stored == before


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=x"),
        (b"--x\r\nno header\r\n--x--", "multipart/form-data; boundary=x"),
        (b'{"prompt": "x"}', "application/json"),
        (b"prompt=x&" * 1000, "application/x-www-form-urlencoded"),
    ],
)
def test_what_is_no_form(service: Service, body: bytes, kind: str) -> None:
    answer = service.client.post("/v1/images/edits", content=body, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "FIELD_INVALID")


def test_a_body_is_bounded(tmp_path: Any) -> None:
    with serving(tmp_path, max_body_bytes=4096) as service:
        answer = send(service, {}, [("image", ("photo.png", bytes(8192)))])
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "BODY_TOO_LARGE")
