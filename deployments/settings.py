"""Where things are and how to render: settings of everything that runs a pipeline; the environment wins."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from cluster.net.urls import parse_hosts
from deployments.catalog import CATALOG

Models = TypeVar("Models", bound=Iterable[str])


def _split(value: Any) -> Any:  # noqa: ANN401 - whatever the file holds, validated after this
    """Split what the environment holds: names separated by commas."""
    if not isinstance(value, str):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _are_hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    parse_hosts(value)
    return value


def are_models(value: Models) -> Models:
    """Return `value` if it holds ids of the catalogue only; raises `ValueError` otherwise."""
    unknown = [model for model in value if model not in CATALOG]
    if unknown:
        raise ValueError(f"no such model: {', '.join(unknown)}; there are {', '.join(CATALOG)}")
    return value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class RenderSettings(BaseSettings):
    """Where things are and how to render; shared by gateway, workers and `lora-serve render`.

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
    vae_tiling: Annotated[Names, AfterValidator(are_models), Field(validation_alias="VAE_TILING")] = ()
    inference_timeout_s: Annotated[float, Field(validation_alias="INFERENCE_TIMEOUT", gt=0)] = 3600.0
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


class WorkerSettings(RenderSettings):
    """What the engine of a worker keeps to, and how long its lease is.

    `fuse_after` is by model id: after so many prompts in a row with the same LoRAs and multipliers, these are
    fused with the weights. `compile` names the ids whose blocks are compiled, `compile_cache` where the node
    keeps what was compiled.
    """

    lease_s: Annotated[float, Field(gt=0)] = 30.0
    adapter_bytes: Annotated[int, Field(ge=0)] = 8 * 2**30
    host_adapter_bytes: Annotated[int, Field(ge=0)] = 8 * 2**30
    fuse_after: Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(are_models)] = {}

    compile: Annotated[tuple[str, ...], AfterValidator(are_models)] = ()
    compile_cache: Path = Path("var/compile_cache")

    @model_validator(mode="after")
    def _change_what_stays(self) -> WorkerSettings:
        if (self.fuse_after or self.compile) and self.offload != "none":
            raise ValueError("what is fused or compiled stays on the device: offload must be none")
        return self
