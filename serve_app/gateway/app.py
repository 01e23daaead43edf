"""The HTTP routes. Blocking work runs in threads, never on the event loop."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse

from cluster.jobs.model import Job, JobState
from cluster.secrets import can_seal
from deployments.catalog import CATALOG
from deployments.loras.format.inspection import Inspection
from deployments.spec.formats import FILE_TYPES
from serve_app.admission.webhooks import open_signer
from serve_app.background.job_changes import View
from serve_app.gateway.auth import SCHEME, KeyedRoute, Tenant, open_keys
from serve_app.gateway.batch_routes import batches
from serve_app.gateway.body_bounds import BoundedRoute
from serve_app.gateway.error_handlers import install_handlers
from serve_app.gateway.event_stream import DOCUMENTED, EventStream, check_event_id, events_since
from serve_app.gateway.listing import MAX_LIMIT, read_page
from serve_app.gateway.openai.errors import documented as documented_as_openai
from serve_app.gateway.openai.routes import images
from serve_app.gateway.page_files import page_router
from serve_app.gateway.shared import Parts, Shared, open_parts
from serve_app.gateway.submission import IdempotencyKey, check_key, submit
from serve_app.settings import GatewayArgs
from serve_app.wire.answers import (
    HealthAnswer,
    ListAnswer,
    ModelAnswer,
    ModelsAnswer,
    Outputs,
    ReadyAnswer,
    ResultAnswer,
    StatusAnswer,
    SubmitAnswer,
)
from serve_app.wire.openapi import DescribedApp
from serve_app.wire.openapi_errors import Responses, documented
from serve_app.wire.refusals import INSPECTION, SUBMISSION, Code, Refusal
from serve_app.wire.requests import UUID, InferenceRequest, InspectRequest

logger = logging.getLogger(__name__)

MAX_WAIT_S = 60.0

_ID = re.compile(UUID)

_MEDIA_TYPES = {f".{suffix}": media_type for suffix, media_type in FILE_TYPES.values()} | {
    ".json": "application/json"
}


async def _request_id(
    request_id: Annotated[str, Path(description="Id of the request", json_schema_extra={"format": "uuid"})],
) -> str:
    """Reject malformed ids early; PostgreSQL refuses some strings."""
    if not _ID.fullmatch(request_id):
        raise Refusal(Code.REQUEST_NOT_FOUND, request_id=request_id)
    return request_id


RequestId = Annotated[str, Depends(_request_id)]
Wait = Annotated[
    float,
    Query(
        ge=0,
        le=MAX_WAIT_S,
        allow_inf_nan=False,
        description="Seconds to wait for the job to end before answering.",
    ),
]
Found = TypeVar("Found")

_OF_A_REQUEST = documented(Code.REQUEST_NOT_FOUND, Code.STORE_UNAVAILABLE)

v1 = APIRouter(prefix="/v1", route_class=KeyedRoute)

public = APIRouter(route_class=BoundedRoute)
"""Routes that need no key. The path of an output cannot be guessed, like a presigned URL."""


def create_app(settings: GatewayArgs) -> FastAPI:
    """Return the ASGI application. Its lifespan opens the stores and runs the janitor and long polls.

    Raises `ValueError` or `OSError` if the keys in the environment cannot be used.
    """
    keys = open_keys()
    can_seal()  # A malformed SECRET_KEY fails here, not at the first request that needs it.
    signer = open_signer()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if keys is None:
            logger.warning("the service is open to all who can reach its port; set API_KEYS to require keys")
        async with open_parts(settings, signer) as app.state.parts:
            yield

    app = DescribedApp(
        title="lora-serve",
        version="1",
        description="LoRA inference for diffusion models.",
        lifespan=lifespan,
        responses=documented(Code.INTERNAL_ERROR),
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.max_body_bytes = settings.max_body_bytes
    app.state.keys = keys
    install_handlers(app)
    _include(app, v1, documented(Code.API_KEY_REQUIRED))
    _include(app, batches, documented(Code.API_KEY_REQUIRED))
    _include(app, images, documented_as_openai(Code.API_KEY_REQUIRED))
    app.include_router(public)
    app.include_router(page_router())
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _include(app: FastAPI, router: APIRouter, without_key: Responses) -> None:
    """Include a router of `KeyedRoute`s. /openapi.json mentions keys only if the service has some."""
    if app.state.keys is None:
        app.include_router(router)
    else:
        app.include_router(router, dependencies=[Depends(SCHEME)], responses=without_key)


@v1.post("/inference", responses=documented(*SUBMISSION))
async def submit_request(
    body: InferenceRequest,
    tenant: Tenant,
    parts: Shared,
    idempotency_key: IdempotencyKey = None,
) -> SubmitAnswer:
    """Store a request and return its id. A worker renders it later."""
    check_key(idempotency_key)
    job = await submit(body, idempotency_key, tenant, parts)
    return SubmitAnswer.of(job, parts.settings.base_url)


@v1.get("/requests", responses=documented(Code.MODEL_NOT_FOUND, Code.CURSOR_INVALID, Code.STORE_UNAVAILABLE))
async def list_requests(
    tenant: Tenant,
    parts: Shared,
    state: Annotated[JobState | None, Query(description="Only requests in this state")] = None,
    model: Annotated[
        str | None,
        Query(description="Only requests of this model", json_schema_extra={"enum": list(CATALOG)}),
    ] = None,
    batch: Annotated[
        str | None, Query(description="Only requests of this batch", pattern=f"^{UUID}$")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Maximum number of requests per page")] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the previous page")] = None,
) -> ListAnswer:
    """List your requests, newest first."""
    return await parts.run(partial(read_page, parts.queue, tenant, state, model, batch, limit, cursor))


@v1.get("/requests/{request_id}/status", responses=_OF_A_REQUEST)
async def read_status(request_id: RequestId, tenant: Tenant, parts: Shared, wait: Wait = 0.0) -> StatusAnswer:
    """Return the state and progress of a request."""
    return await parts.when_ended(partial(_status, request_id, tenant, parts), request_id, wait)


@v1.get("/requests/{request_id}/result", responses=_OF_A_REQUEST)
async def read_result(request_id: RequestId, tenant: Tenant, parts: Shared, wait: Wait = 0.0) -> ResultAnswer:
    """Return the outputs of a request. `outputs` is null until it has succeeded."""
    return await parts.when_ended(partial(_result, request_id, tenant, parts), request_id, wait)


@v1.get(
    "/requests/{request_id}/events",
    response_class=Response,
    responses=documented(Code.EVENT_ID_INVALID) | _OF_A_REQUEST | DOCUMENTED,
)
async def follow_request(
    request_id: RequestId,
    tenant: Tenant,
    parts: Shared,
    last_event_id: Annotated[str | None, Header(description="Id of the last event that you received")] = None,
) -> Response:
    """Stream the changes of a request as server-sent events: `state`, `queue` and `progress`."""
    seen = check_event_id(last_event_id)
    view = await parts.run(partial(_view, request_id, tenant, parts))
    if view.job.state.terminal and not any(events_since(view, seen)):
        return Response(status_code=204)  # Without a 204, an EventSource would reconnect forever.
    return EventStream(parts.waiting.following, view, seen)


@v1.delete(
    "/requests/{request_id}",
    responses=documented(Code.REQUEST_NOT_FOUND, Code.JOB_ALREADY_FINISHED, Code.STORE_UNAVAILABLE)
    | {202: {"model": StatusAnswer, "description": "The request stops within one step"}},
)
async def cancel_request(
    request_id: RequestId, tenant: Tenant, parts: Shared, response: Response
) -> StatusAnswer:
    """Cancel a request. A queued one ends at once (200), a running one within one step (202)."""
    answer = await parts.run(partial(_cancel, request_id, tenant, parts))
    if answer.status is not JobState.CANCELED:
        response.status_code = 202
    return answer


@v1.post("/loras/inspect", responses=documented(*INSPECTION))
async def inspect_lora(body: InspectRequest, parts: Shared) -> Inspection:
    """Report what a LoRA is and which models it fits. Nothing is stored."""
    return await parts.run(partial(parts.inspector.inspect, body.path, body.hf_token), parts.inspections)


@v1.get("/models")
async def list_models(parts: Shared) -> ModelsAnswer:
    """List the model ids and their defaults."""
    most = parts.settings.max_loras
    return ModelsAnswer(models=[ModelAnswer.of(row, most.get(row.id, 1)) for row in CATALOG.values()])


@public.get("/health")
async def check_health() -> HealthAnswer:
    """Report that this process is alive."""
    return HealthAnswer()


@public.get("/ready", responses=documented(Code.STORE_UNAVAILABLE))
async def check_ready(parts: Shared) -> ReadyAnswer:
    """Report whether jobs can be stored now; 503 if not."""
    await parts.run(parts.queue.check)
    return ReadyAnswer()


@public.get(
    "/outputs/{key:path}",
    response_class=FileResponse,
    responses=documented(Code.OUTPUT_NOT_FOUND)
    | {200: {"description": "The file", "content": {kind: {} for kind in _MEDIA_TYPES.values()}}},
)
async def read_output(
    key: Annotated[str, Path(description="The part after `/outputs/` in a URL of a result")], parts: Shared
) -> FileResponse:
    """Send an output or manifest from the local output directory. With S3, clients fetch from S3 instead."""
    path = await parts.run(partial(parts.store.local_path, key))
    if path is None:
        raise Refusal(Code.OUTPUT_NOT_FOUND)
    media_type = _MEDIA_TYPES.get(path.suffix, "application/octet-stream")
    return FileResponse(path, media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})


def _job(request_id: str, tenant: str, parts: Parts) -> Job:
    """Return a job of `tenant`. Another tenant's job is refused as if it did not exist."""
    job = parts.queue.get(request_id)
    return _known(request_id, job if job is not None and job.tenant == tenant else None)


def _view(request_id: str, tenant: str, parts: Parts) -> View:
    view = parts.waiting.following.view(request_id)
    return _known(request_id, view if view is not None and view.job.tenant == tenant else None)


def _known(request_id: str, found: Found | None) -> Found:
    if found is None:
        raise Refusal(Code.REQUEST_NOT_FOUND, request_id=request_id)
    return found


def _status(request_id: str, tenant: str, parts: Parts) -> StatusAnswer:
    job = _job(request_id, tenant, parts)
    return StatusAnswer.of(job, parts.queue.ahead(job) if job.state is JobState.IN_QUEUE else None)


def _result(request_id: str, tenant: str, parts: Parts) -> ResultAnswer:
    job = _job(request_id, tenant, parts)
    if job.state is not JobState.SUCCEEDED:
        return ResultAnswer.of(job, None)
    outputs = Outputs.of(parts.queue.outputs(job.id), parts.store, parts.settings.base_url)
    return ResultAnswer.of(job, outputs)


def _cancel(request_id: str, tenant: str, parts: Parts) -> StatusAnswer:
    _job(request_id, tenant, parts)  # Only its tenant can cancel it; the tenant of a job never changes.
    job, was_live = _known(request_id, parts.queue.cancel(request_id))
    if not was_live:
        raise Refusal(Code.JOB_ALREADY_FINISHED, request_id=request_id, status=job.state)
    return StatusAnswer.of(job, None)
