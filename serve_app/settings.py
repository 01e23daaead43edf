"""Typed builder arguments of serve_config.yaml. Environment variables override them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from deployments.settings import Names, RenderSettings, WorkerSettings, are_models
from serve_app.wire.requests import MAX_ITEMS

Count = Annotated[int, Field(ge=1, le=MAX_ITEMS)]


class Settings(RenderSettings):
    """The settings for rendering, and the limits of a request."""

    # By model id; 1 by default, as in the reference server.
    max_loras: Annotated[dict[str, Count], AfterValidator(are_models)] = {}  # noqa: RUF012 - pydantic copies it
    max_prompts: Count = 100
    max_prompt_chars: Annotated[int, Field(ge=1)] = 10_000


class GatewayArgs(Settings):
    """Arguments of `build_gateway`.

    `base_url` is the URL that clients use; a trailing slash is removed. Requests that arrive at the same time
    can exceed the limits on queued jobs. `retention_days` counts from a job's end; 0 keeps jobs and outputs
    forever. Keys are not a setting, because Serve logs these arguments: `serve_app.gateway.auth` reads them
    from the environment.
    """

    base_url: Annotated[str, Field(validation_alias="BASE_URL")] = "http://127.0.0.1:8000"
    cors_origins: Annotated[Names, Field(validation_alias="CORS_ORIGINS")] = ()
    max_body_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    max_queued: Annotated[int, Field(ge=1)] = 10_000
    max_queued_per_key: Annotated[int, Field(ge=1)] = 1000
    retention_days: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0

    @field_validator("base_url")
    @classmethod
    def _without_slash(cls, value: str) -> str:
        return value.rstrip("/")


class RenderArgs(WorkerSettings, Settings):
    """Settings of `lora-serve render`: those of a worker's engine, and the request limits of a gateway."""


class ModelsArgs(RenderArgs):
    """Arguments of `build_models`: the model ids of one application, and the settings of their workers."""

    models: Annotated[tuple[str, ...], AfterValidator(are_models), Field(min_length=1)]
