"""Settings of everything that runs a pipeline: paths, limits, how to render. The environment wins."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from cluster.net.urls import parse_hosts
from deployments.catalog import CATALOG

Models = TypeVar("Models", bound=Iterable[str])


def _split(value: Any) -> Any:  # noqa: ANN401 - any value of the config file, validated later
    """Split the comma-separated names of an environment variable."""
    if not isinstance(value, str):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _are_hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    parse_hosts(value)
    return value


def are_models(value: Models) -> Models:
    """Return `value`. Raises `ValueError` if it contains an id that is not in the catalogue."""
    unknown = [model for model in value if model not in CATALOG]
    if unknown:
        raise ValueError(f"no such model: {', '.join(unknown)}; choose from {', '.join(CATALOG)}")
    return value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class RenderSettings(BaseSettings):
    """Settings shared by gateway, workers and `lora-serve render`.

    Every default works on a single machine. Relative paths start at the working directory. The token for
    gated repositories is not a setting, since huggingface_hub reads `HF_TOKEN` from the environment itself.
    """

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, case_sensitive=True, env_ignore_empty=True, populate_by_name=True
    )

    # Ray Serve logs these arguments, so a URL with a password belongs in `JOBS_URL`, which overrides this.
    jobs: Annotated[str, Field(repr=False)] = "sqlite:///var/jobs.db"
    outputs: Annotated[str, Field(validation_alias="OUTPUT_BASE_PATH")] = "file://var/outputs"
    loras: Annotated[Path, Field(validation_alias="WORKFLOWS_BASE_PATH")] = Path("var/loras")
    lora_cache: Annotated[Path, Field(validation_alias="LORA_DOWNLOAD_CACHE_DIR")] = Path("var/lora_cache")
    lora_cache_bytes: Annotated[int, Field(ge=0)] = 64 * 2**30
    max_lora_bytes: Annotated[int, Field(ge=1)] = 4 * 2**30
    # Allowed besides the public internet: private hosts, as `host` or `host:port`, and S3 buckets.
    fetch_hosts: Annotated[
        Names, AfterValidator(_are_hosts), Field(validation_alias="FETCH_ALLOW_HOSTS")
    ] = ()
    fetch_buckets: Annotated[Names, Field(validation_alias="FETCH_ALLOW_BUCKETS")] = ()
    # Whether the server's own hub token, `HF_TOKEN`, also fetches `hf://` LoRAs of requests without one.
    hub_token_for_requests: bool = False
    checkpoints: Annotated[Path | None, Field(validation_alias="CHECKPOINTS_PATH")] = None
    model_cache: Annotated[Path | None, Field(validation_alias="MODEL_CACHE_DIR")] = None
    device: Annotated[Literal["auto", "cuda", "cpu"], Field(validation_alias="DEVICE")] = "auto"
    offload: Annotated[
        Literal["none", "text", "model", "group", "sequential"], Field(validation_alias="OFFLOAD_MODE")
    ] = "none"
    # Model ids: these decode images larger than a tile in tiles.
    vae_tiling: Annotated[Names, AfterValidator(are_models), Field(validation_alias="VAE_TILING")] = ()
    inference_timeout_s: Annotated[float, Field(validation_alias="INFERENCE_TIMEOUT", gt=0)] = 3600.0
    max_image_pixels: Annotated[int, Field(ge=1)] = 2 * 4096 * 4096

    @field_validator("outputs")
    @classmethod
    def _add_file_scheme(cls, value: str) -> str:
        """Accept a bare path too, as the reference server does."""
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
        """Let the environment override the arguments. No other source is read."""
        return env_settings, init_settings


class WorkerSettings(RenderSettings):
    """Settings of a worker's engine, and the length of its lease in seconds.

    `fuse_after` maps a model id to the number of prompts in a row with the same LoRAs and multipliers after
    which these are fused into the weights. `compile` lists the model ids whose blocks are compiled, and
    `compile_cache` is the directory where the node keeps the compiled code.
    """

    lease_s: Annotated[float, Field(gt=0)] = 30.0
    adapter_bytes: Annotated[int, Field(ge=0)] = 8 * 2**30
    host_adapter_bytes: Annotated[int, Field(ge=0)] = 8 * 2**30
    fuse_after: Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(are_models)] = {}

    compile: Annotated[tuple[str, ...], AfterValidator(are_models)] = ()
    compile_cache: Path = Path("var/compile_cache")

    @model_validator(mode="after")
    def _forbid_offload(self) -> WorkerSettings:
        if (self.fuse_after or self.compile) and self.offload != "none":
            raise ValueError("fused or compiled weights must stay on the device: offload must be none")
        return self
