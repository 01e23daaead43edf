"""`POST /v1/images/generations`, called by the real `openai` package."""

from __future__ import annotations

import asyncio
import base64
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from cluster.failures import FailureCode
from cluster.jobs.model import Claim, JobState
from deployments.catalog import CATALOG
from serve_app.gateway.openai.bodies import ImageGeneration
from serve_app.wire.requests import InferenceRequest
from tests.serve_app.conftest import Service, png, rendering, serving
from tests.serve_app.gateway.openai.conftest import LORAS, prompts


def test_a_picture_by_url(service: Service, client: openai.OpenAI) -> None:
    with rendering(service) as claimed:
        answer = client.images.generate(
            model="flux", prompt="a red fox", size="128x64", response_format="url", extra_body=LORAS
        )
    assert answer.data is not None and answer.data[0].b64_json is None
    url = httpx.URL(answer.data[0].url or "")
    assert service.client.get(url.path).content == png(128, 64)
    (job,) = claimed
    assert answer.model_extra is not None
    assert answer.model_extra["request_id"] == answer._request_id == job.id
    assert (answer.output_format, answer.size) == ("png", "128x64")
    assert job.spec["loras"] == [{**job.spec["loras"][0], "path": "style.safetensors", "multiplier": 0.8}]


def test_every_field_of_ours_goes_through_extra_body(service: Service, client: openai.OpenAI) -> None:
    ours = {
        "neg": "blurry",
        "guidance_scale": 2.5,
        "sample_steps": 7,
        "trigger_word": "p5x",
        "output_format": "webp",
        "sampling": "preview",
        "seed": 2**64 - 1,
    }
    with rendering(service) as claimed:
        answer = client.images.generate(
            model="flux", prompt="[trigger], a fox", n=3, extra_body={**LORAS, **ours}, user="me"
        )
    (job,) = claimed
    assert [prompt["seed"] for prompt in prompts(job)] == [2**64 - 1, 0, 1]
    for prompt in prompts(job):
        assert prompt["prompt"] == "p5x, a fox"
        assert (prompt["neg"], prompt["guidance"], prompt["steps"]) == ("blurry", 2.5, 7)
        assert (prompt["width"], prompt["height"]) == (CATALOG["flux"].width, CATALOG["flux"].height)
        assert prompt["sampling"] == "preview"
    assert job.spec["output_format"] == "webp"
    assert answer.data is not None and len(answer.data) == 3
    assert answer.model_extra is not None
    assert answer.model_extra["warnings"] == [
        "Unknown fields were ignored: 'user'.",
        "2 of 4 modules matched.",
    ]


def test_pictures_in_base64_with_the_seeds_of_prompts(service: Service, client: openai.OpenAI) -> None:
    with rendering(service) as claimed:
        answer = client.images.generate(
            model="flux",
            prompt="a red fox",
            n=2,
            size="auto",
            response_format="b64_json",
            extra_body={**LORAS, "width": 64, "height": 80},
        )
    assert [prompt["seed"] for prompt in prompts(claimed[0])] == [42, 43]
    assert answer.data is not None
    assert [base64.b64decode(picture.b64_json or "") for picture in answer.data] == [png(64, 80)] * 2


def test_an_idempotency_key_makes_one_job(service: Service, client: openai.OpenAI) -> None:
    with rendering(service) as claimed:
        ids = {
            client.images.generate(
                model="flux",
                prompt="once",
                extra_body=LORAS,
                extra_headers={"Idempotency-Key": "openai-1"},
            )._request_id
            for _ in range(2)
        }
    assert ids == {job.id for job in claimed}
    with pytest.raises(openai.ConflictError) as caught:
        client.with_options(max_retries=0).images.generate(
            model="flux", prompt="twice", extra_body=LORAS, extra_headers={"Idempotency-Key": "openai-1"}
        )
    assert caught.value.code == "IDEMPOTENCY_KEY_REUSED"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "dall-e-3"}, "MODEL_NOT_FOUND"),
        ({"model": "wan21_1b"}, "IMAGE_MODEL_REQUIRED"),
        ({"extra_body": {}}, "LORA_FILE_REQUIRED"),
        ({"extra_body": {"loras": [{"path": "none.safetensors"}]}}, "LORA_NOT_FOUND"),
        ({"extra_headers": {"Idempotency-Key": "k" * 256}}, "IDEMPOTENCY_KEY_INVALID"),
        ({"output_format": "mp4"}, "OUTPUT_FORMAT_NOT_SUPPORTED"),
    ],
)
def test_refusals_have_openais_form_and_our_codes(
    service: Service, client: openai.OpenAI, changes: dict[str, Any], code: str
) -> None:
    before = service.stored
    request: dict[str, Any] = {"model": "flux", "prompt": "a red fox", "extra_body": LORAS}
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**request | changes)
    assert (caught.value.code, caught.value.type) == (code, "invalid_request_error")
    assert service.stored == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 11),
        ("size", "big"),
        ("size", "32x64"),
        ("size", "64x5000"),
        ("response_format", "png"),
        ("seed", -2),
        ("stream", True),
        ("loras", "style.safetensors"),
        ("prompt", "\x00"),
    ],
)
def test_a_bad_field_is_named(service: Service, client: openai.OpenAI, field: str, value: object) -> None:
    before = service.stored
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.images.generate(model="flux", prompt="a fox", extra_body={**LORAS, field: value})
    assert caught.value.code == "FIELD_INVALID"
    assert caught.value.param is not None and caught.value.param.split(".")[0] == field
    assert service.stored == before


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"", "application/json"),
        (b'{"model": "flux", "prompt": "a fox", "loras": [{"path": "style.safetensors"}]}', "text/plain"),
    ],
)
def test_what_is_no_json(service: Service, content: bytes, kind: str) -> None:
    headers = {"Content-Type": kind}
    answer = service.client.post("/v1/images/generations", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "FIELD_INVALID")


def fail(service: Service, code: FailureCode) -> Any:
    return lambda claim: service.queue.finish(
        claim, JobState.FAILED, error="It is a sentence.", error_code=code
    )


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (FailureCode.LORA_NO_MATCH, openai.BadRequestError),
        (FailureCode.OUT_OF_MEMORY, openai.InternalServerError),
    ],
)
def test_a_failed_job_is_an_error_that_is_not_sent_again(
    service: Service, client: openai.OpenAI, failure: FailureCode, kind: type[openai.APIStatusError]
) -> None:
    with rendering(service, end=fail(service, failure)) as claimed, pytest.raises(kind) as caught:
        client.images.generate(model="flux", prompt="a red fox", extra_body=LORAS)
    (job,) = claimed
    assert caught.value.code == failure
    assert caught.value.request_id == job.id
    assert "It is a sentence." in caught.value.message


def test_a_canceled_job(service: Service, client: openai.OpenAI) -> None:
    def cancel(claim: Claim) -> None:
        service.queue.cancel(claim.job.id)
        service.queue.finish(claim, JobState.CANCELED)

    with rendering(service, end=cancel) as claimed, pytest.raises(openai.ConflictError) as caught:
        client.images.generate(model="flux", prompt="a red fox", extra_body=LORAS)
    assert caught.value.code == "REQUEST_CANCELED"
    assert [job.id for job in claimed] == [caught.value.request_id]


def test_the_wait_has_a_bound_and_the_job_goes_on(service: Service, client: openai.OpenAI) -> None:
    start = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(model="flux", prompt="a red fox", extra_body=LORAS, extra_query={"wait": 0.5})
    assert 0.5 <= time.monotonic() - start < 10
    job_id = caught.value.request_id
    assert (caught.value.status_code, caught.value.code) == (504, "WAIT_OVER")
    assert job_id is not None and job_id in caught.value.message
    service.publish(service.claim(job_id))
    assert service.result(job_id)["outputs"]["images"]


def test_a_client_that_goes_away_leaves_its_job(fresh: Service) -> None:
    with (
        openai.OpenAI(base_url=f"{fresh.client.base_url}/v1", api_key="unused", max_retries=0) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.images.generate(
            model="flux", prompt="a fox", extra_body=LORAS, extra_query={"wait": 3}, timeout=0.5
        )
    (listed,) = fresh.client.get("/v1/requests").json()["requests"]
    fresh.publish(fresh.claim(listed["request_id"]))
    assert fresh.status(listed["request_id"])["status"] == "succeeded"


def test_many_wait_at_once_and_the_gateway_answers_others(fresh: Service) -> None:
    """More calls wait than the gateway has threads."""

    async def call(count: int) -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{fresh.client.base_url}/v1", api_key="unused", max_retries=0
        ) as client:
            made = await asyncio.gather(
                *(
                    client.images.generate(model="flux", prompt=f"fox {i}", extra_body=LORAS)
                    for i in range(count)
                )
            )
        return [answer._request_id or "" for answer in made]

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asyncio.run, call(40))
        while fresh.stored[0] < 40:
            time.sleep(0.05)
        assert fresh.client.get("/ready", timeout=10).json() == {"status": "ready"}
        with rendering(fresh) as claimed:
            ids = waiting.result()
    assert sorted(ids) == sorted(job.id for job in claimed)


def test_who_waits_holds_no_body(fresh: Service) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = {"model": "flux", "prompt": "a fox", "ctrl_img": "A" * 10**6, **LORAS}
        waiting = pool.submit(fresh.client.post, "/v1/images/generations", json=asked)
        while not fresh.stored[0]:
            time.sleep(0.05)
        time.sleep(1)
        gc.collect()
        bodies = [each for each in gc.get_objects() if type(each) in (ImageGeneration, InferenceRequest)]
        assert not waiting.done() and not bodies
        (listed,) = fresh.client.get("/v1/requests").json()["requests"]
        fresh.client.delete(f"/v1/requests/{listed['request_id']}")
        assert waiting.result().json()["error"]["code"] == "REQUEST_CANCELED"


def test_keys_are_asked_for_in_openais_form(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS", "alice:Sg7alice-0123456789")
    with serving(tmp_path) as keyed:
        base_url = f"{keyed.client.base_url}/v1"
        with (
            openai.OpenAI(base_url=base_url, api_key="Sg7wrong") as wrong,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            wrong.images.generate(model="flux", prompt="a fox", extra_body=LORAS)
        assert caught.value.code == "API_KEY_REQUIRED"
        assert caught.value.response.headers["WWW-Authenticate"] == "Bearer"
        with (
            openai.OpenAI(base_url=base_url, api_key="Sg7alice-0123456789") as alice,
            rendering(keyed) as jobs,
        ):
            alice.images.generate(model="flux", prompt="a fox", extra_body=LORAS)
        assert [job.tenant for job in jobs] == ["alice"]
