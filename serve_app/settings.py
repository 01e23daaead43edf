"""Typed builder arguments of serve_config.yaml; the environment wins over them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from cluster.net.urls import parse_hosts
from deployments.catalog import CATALOG
from serve_app.wire.requests import MAX_ITEMS

Models = TypeVar("Models", bound=Iterable[str])


def _split(value: Any) -> Any:  # noqa: ANN401 - whatever the file holds, validated after this
    """Split what the environment holds: names separated by commas."""
    if not isinstance(value, str):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _are_hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    parse_hosts(value)
    return value


def _are_models(value: Models) -> Models:
    unknown = [model for model in value if model not in CATALOG]
    if unknown:
        raise ValueError(f"no such model: {', '.join(unknown)}; there are {', '.join(CATALOG)}")
    return value


Count = Annotated[int, Field(ge=1, le=MAX_ITEMS)]

Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """Where things are, how to render, and the bounds of a request; shared by gateway, workers and `render`.

    Every default works on one machine as it stands. Relative paths start at the working directory. A token
    for gated repositories is no setting: huggingface_hub reads `HF_TOKEN` from the environment by itself.
    """

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, case_sensitive=True, env_ignore_empty=True, populate_by_name=True
    )

    # Serve logs these arguments: a URL with a password goes into `JOBS_URL`, which wins where it is opened.
    jobs: Annotated[str, Field(repr=False)] = "sqlite:///var/jobs.db"
    outputs: Annotated[str, Field(validation_alias="OUTPUT_BASE_PATH")] = "file://var/outputs"
    loras: Annotated[Path, Field(validation_alias="WORKFLOWS_BASE_PATH")] = Path("var/loras")
    lora_cache: Annotated[Path, Field(validation_alias="LORA_DOWNLOAD_CACHE_DIR")] = Path("var/lora_cache")
    lora_cache_bytes: Annotated[int, Field(ge=0)] = 64 * 2**30
    max_lora_bytes: Annotated[int, Field(ge=1)] = 4 * 2**30
    # Beside the public internet: `host` or `host:port` of private networks, and buckets of S3.
    fetch_hosts: Annotated[
        Names, AfterValidator(_are_hosts), Field(validation_alias="FETCH_ALLOW_HOSTS")
    ] = ()
    fetch_buckets: Annotated[Names, Field(validation_alias="FETCH_ALLOW_BUCKETS")] = ()
    checkpoints: Annotated[Path | None, Field(validation_alias="CHECKPOINTS_PATH")] = None
    model_cache: Annotated[Path | None, Field(validation_alias="MODEL_CACHE_DIR")] = None
    device: Annotated[Literal["auto", "cuda", "cpu"], Field(validation_alias="DEVICE")] = "auto"
    offload: Annotated[
        Literal["none", "text", "model", "group", "sequential"], Field(validation_alias="OFFLOAD_MODE")
    ] = "none"
    # By model id: decode in tiles what is larger than one.
    vae_tiling: Annotated[Names, AfterValidator(_are_models), Field(validation_alias="VAE_TILING")] = ()
    inference_timeout_s: Annotated[float, Field(validation_alias="INFERENCE_TIMEOUT", gt=0)] = 3600.0

    # By model id; one where nothing is said, as in the reference server.
    max_loras: Annotated[dict[str, Count], AfterValidator(_are_models)] = {}
    max_prompts: Count = 100
    max_prompt_chars: Annotated[int, Field(ge=1)] = 10_000
    max_image_pixels: Annotated[int, Field(ge=1)] = 2 * 4096 * 4096

    @field_validator("outputs")
    @classmethod
    def _name_the_scheme(cls, value: str) -> str:
        """Take a bare path too, as the reference does."""
        return value if "://" in value else f"file://{value}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the environment before the arguments; no other source is read."""
        return env_settings, init_settings


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


class ModelsArgs(Settings):
    """Arguments of `build_models`: the ids of one application, and what each of their workers keeps to.

    `fuse_after` is by model id: after so many prompts in a row with the same LoRAs and multipliers, these are
    fused with the weights. `compile` names the ids whose blocks are compiled, `compile_cache` where the node
    keeps what was compiled.
    """

    models: Annotated[tuple[str, ...], AfterValidator(_are_models), Field(min_length=1)]
    lease_s: Annotated[float, Field(gt=0)] = 30.0
    adapter_bytes: Annotated[int, Field(ge=0)] = 8 * 2**30
    host_adapter_bytes: Annotated[int, Field(ge=0)] = 8 * 2**30
    fuse_after: Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(_are_models)] = {}

    compile: Annotated[tuple[str, ...], AfterValidator(_are_models)] = ()
    compile_cache: Path = Path("var/compile_cache")

    @model_validator(mode="after")
    def _change_what_stays(self) -> ModelsArgs:
        if (self.fuse_after or self.compile) and self.offload != "none":
            raise ValueError("what is fused or compiled stays on the device: offload must be none")
        return self
