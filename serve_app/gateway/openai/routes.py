"""`POST /v1/images/generations` and `/v1/images/edits`: submit, wait, answer with the pictures."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from cluster.failures import StoreUnavailable
from cluster.jobs.model import Job, JobState
from cluster.objects.store import StoreError
from deployments.catalog import CATALOG
from serve_app.gateway.auth import Tenant
from serve_app.gateway.openai.bodies import NUMBERED, ImageAnswer, ImageEdit, ImageGeneration, ImagesAnswer
from serve_app.gateway.openai.errors import OpenAIRoute, Unmade, documented_with_failures
from serve_app.gateway.openai.reading import described, described_form, read_edit, read_generation
from serve_app.gateway.shared import Parts, Shared
from serve_app.gateway.submission import IdempotencyKey, check_key, submit
from serve_app.wire.answers import Outputs, ResultAnswer, StatusAnswer
from serve_app.wire.refusals import SUBMISSION, Code, Refusal

WAIT_S = 300.0
"""How long an answer may take unless the request says otherwise: OpenAI's client gives up after 600 s."""

MAX_WAIT_S = 600.0

images = APIRouter(prefix="/v1/images", route_class=OpenAIRoute)


@dataclass(frozen=True)
class _Call:
    """What both routes get beside the body."""

    request: Request
    tenant: str
    parts: Parts
    key: str | None
    wait_s: float


async def _call(
    request: Request,
    tenant: Tenant,
    parts: Shared,
    idempotency_key: IdempotencyKey = None,
    wait: Annotated[
        float,
        Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="Longest time to answer, in seconds."),
    ] = WAIT_S,
) -> _Call:
    check_key(idempotency_key)
    return _Call(request, tenant, parts, idempotency_key, wait)


Call = Annotated[_Call, Depends(_call)]

_REFUSALS = documented_with_failures(
    *SUBMISSION,
    Code.IMAGE_MODEL_REQUIRED,
    Code.FIELD_INVALID,
    Code.REQUEST_CANCELED,
    Code.WAIT_OVER,
    Code.INTERNAL_ERROR,
)


@images.post(
    "/generations",
    responses=_REFUSALS,
    response_model_exclude_none=True,
    openapi_extra=described(ImageGeneration, "application/json"),
)
async def generate_images(call: Call, response: Response) -> ImagesAnswer:
    """Make pictures of a prompt, and answer when they are there."""
    return await _wait(await _submit(await read_generation(call.request), call), call, response)


@images.post(
    "/edits",
    responses=_REFUSALS,
    response_model_exclude_none=True,
    openapi_extra=described_form(ImageEdit),
)
async def edit_images(call: Call, response: Response) -> ImagesAnswer:
    """Make pictures of a prompt and of up to three images, and answer when they are there."""
    return await _wait(await _submit(await read_edit(call.request, call.parts), call), call, response)


@dataclass(frozen=True)
class _Asked:
    """What is left of a request that is stored."""

    request_id: str
    embedded: bool


async def _submit(body: ImageGeneration, call: _Call) -> _Asked:
    """Store the request. Raises `Refusal` and the stores' errors."""
    if body.model in CATALOG and CATALOG[body.model].video:
        raise Refusal(Code.IMAGE_MODEL_REQUIRED, model=body.model)
    if isinstance(body, ImageEdit):
        _check_takes_images(body)
    job = await submit(body.inference_request(), call.key, call.tenant, call.parts)
    return _Asked(job.id, body.response_format == "b64_json")


async def _wait(asked: _Asked, call: _Call, response: Response) -> ImagesAnswer:
    """Wait without a thread, then answer. Raises `Unmade`."""
    response.headers["X-Request-Id"] = asked.request_id
    try:
        read = partial(_status, asked.request_id, call.parts)
        told = await call.parts.when_ended(read, asked.request_id, call.wait_s)
        if told.status is not JobState.SUCCEEDED:
            raise Unmade(asked.request_id, told)
        return await call.parts.run(partial(_answer, asked, call.parts))
    except (StoreUnavailable, StoreError):
        # The job is there, so this must not read as if it might be sent again.
        raise Unmade(asked.request_id, None) from None


def _check_takes_images(body: ImageEdit) -> None:
    """Refuse images that the model would not look at. An unknown model is refused later."""
    if body.model not in CATALOG:
        return
    row = CATALOG[body.model].sampled(body.sampling or "reference")
    most = min(row.control_images.most, len(NUMBERED))
    if len(body.image) > most:
        raise Refusal(Code.TOO_MANY_CONTROL_IMAGES, model=body.model, prompt_index=0, most=most)


def _job(request_id: str, parts: Parts) -> Job:
    job = parts.queue.get(request_id)
    if job is None:
        raise Refusal(Code.REQUEST_NOT_FOUND, request_id=request_id)
    return job


def _status(request_id: str, parts: Parts) -> StatusAnswer:
    return StatusAnswer.of(_job(request_id, parts), None)


def _answer(asked: _Asked, parts: Parts) -> ImagesAnswer:
    job, recorded = _job(asked.request_id, parts), parts.queue.outputs(asked.request_id)
    made = Outputs.of(recorded, parts.store, parts.settings.base_url).images
    data = [
        ImageAnswer(seed=image.seed, b64_json=base64.b64encode(parts.store.get(output["key"])).decode())
        if asked.embedded
        else ImageAnswer(seed=image.seed, url=image.url)
        for image, output in zip(made, recorded, strict=True)
    ]
    return ImagesAnswer(
        created=int(job.created_at),
        data=data,
        output_format=made[0].format,
        size=f"{made[0].width}x{made[0].height}",
        request_id=job.id,
        warnings=ResultAnswer.of(job, None).metadata.warnings,
    )
