"""`POST /v1/images/generations` and `/v1/images/edits`: submit a request, wait, return the pictures."""

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
from serve_app.gateway.openai.errors import NoPictures, OpenAIRoute, documented_with_failures
from serve_app.gateway.openai.reading import described, described_form, read_edit, read_generation
from serve_app.gateway.shared import Parts, Shared
from serve_app.gateway.submission import IdempotencyKey, check_key, submit
from serve_app.wire.answers import Outputs, ResultAnswer, StatusAnswer
from serve_app.wire.refusals import SUBMISSION, Code, Refusal

WAIT_S = 300.0
"""Default longest wait for the pictures, in seconds. OpenAI's client gives up after 600 s."""

MAX_WAIT_S = 600.0

images = APIRouter(prefix="/v1/images", route_class=OpenAIRoute)


@dataclass(frozen=True)
class _Call:
    """The parameters of both routes, except the body."""

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
        Query(
            ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="Longest wait for the pictures, in seconds."
        ),
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
    """Make pictures from a prompt, and return them when they are ready."""
    return await _wait(await _submit(await read_generation(call.request), call), call, response)


@images.post(
    "/edits",
    responses=_REFUSALS,
    response_model_exclude_none=True,
    openapi_extra=described_form(ImageEdit),
)
async def edit_images(call: Call, response: Response) -> ImagesAnswer:
    """Make pictures from a prompt and up to three images, and return them when they are ready."""
    return await _wait(await _submit(await read_edit(call.request, call.parts), call), call, response)


@dataclass(frozen=True)
class _Stored:
    """What a route keeps of a stored request; `embedded` asks for `b64_json` instead of URLs."""

    request_id: str
    embedded: bool


async def _submit(body: ImageGeneration, call: _Call) -> _Stored:
    """Store the request. Raises `Refusal` and the stores' errors."""
    if body.model in CATALOG and CATALOG[body.model].video:
        raise Refusal(Code.IMAGE_MODEL_REQUIRED, model=body.model)
    if isinstance(body, ImageEdit):
        _check_takes_images(body)
    job = await submit(body.inference_request(), call.key, call.tenant, call.parts)
    return _Stored(job.id, body.response_format == "b64_json")


async def _wait(stored: _Stored, call: _Call, response: Response) -> ImagesAnswer:
    """Wait without a thread, then return the pictures. Raises `NoPictures`."""
    response.headers["X-Request-Id"] = stored.request_id
    try:
        read = partial(_status, stored.request_id, call.parts)
        status = await call.parts.when_ended(read, stored.request_id, call.wait_s)
        if status.status is not JobState.SUCCEEDED:
            raise NoPictures(stored.request_id, status)
        return await call.parts.run(partial(_answer, stored, call.parts))
    except (StoreUnavailable, StoreError):
        # The job is stored, so the client must not retry as it would after STORE_UNAVAILABLE.
        raise NoPictures(stored.request_id, None) from None


def _check_takes_images(body: ImageEdit) -> None:
    """Refuse more images than the model uses. An unknown model is refused later."""
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


def _answer(stored: _Stored, parts: Parts) -> ImagesAnswer:
    job, recorded = _job(stored.request_id, parts), parts.queue.outputs(stored.request_id)
    made = Outputs.of(recorded, parts.store, parts.settings.base_url).images
    data = [
        ImageAnswer(seed=image.seed, b64_json=base64.b64encode(parts.store.get(output["key"])).decode())
        if stored.embedded
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
