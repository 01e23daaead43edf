"""Typed builder arguments of serve_config.yaml; the environment wins over them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from deployments.settings import Names, RenderSettings, WorkerSettings, are_models
from serve_app.wire.requests import MAX_ITEMS

Count = Annotated[int, Field(ge=1, le=MAX_ITEMS)]


class Settings(RenderSettings):
    """The settings for rendering, and the bounds of a request."""

    # By model id; one where nothing is said, as in the reference server.
    max_loras: Annotated[dict[str, Count], AfterValidator(are_models)] = {}  # noqa: RUF012 - pydantic copies it
    max_prompts: Count = 100
    max_prompt_chars: Annotated[int, Field(ge=1)] = 10_000


class GatewayArgs(Settings):
    """Arguments of `build_gateway`.

    `base_url` is how clients reach it, with no slash at the end. The bounds on queued jobs may be overshot by
    requests that come at once. `retention_days` counts from a job's end; 0 keeps jobs and outputs for ever.
    Keys are no setting: Serve logs these arguments, so `serve_app.gateway.auth` reads the environment itself.
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
    """What `lora-serve render` keeps to: the engine of a worker behind the bounds of a gateway."""


class ModelsArgs(RenderArgs):
    """Arguments of `build_models`: the ids of one application, and what each of their workers keeps to."""

    models: Annotated[tuple[str, ...], AfterValidator(are_models), Field(min_length=1)]
