"""Arguments, environment and defaults of the applications."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.settings import GatewayArgs, ModelsArgs, Settings

VARIABLES = {
    "OUTPUT_BASE_PATH": ("outputs", "/env/outputs", "file:///env/outputs"),
    "WORKFLOWS_BASE_PATH": ("loras", "/env/loras", Path("/env/loras")),
    "LORA_DOWNLOAD_CACHE_DIR": ("lora_cache", "/env/cache", Path("/env/cache")),
    "CHECKPOINTS_PATH": ("checkpoints", "/env/checkpoints", Path("/env/checkpoints")),
    "MODEL_CACHE_DIR": ("model_cache", "/env/models", Path("/env/models")),
    "DEVICE": ("device", "cuda", "cuda"),
    "OFFLOAD_MODE": ("offload", "sequential", "sequential"),
    "VAE_TILING": ("vae_tiling", "krea2, wan22_5b", ("krea2", "wan22_5b")),
    "INFERENCE_TIMEOUT": ("inference_timeout_s", "120", 120.0),
    "BASE_URL": ("base_url", "https://pictures.example/", "https://pictures.example"),
    "FETCH_ALLOW_HOSTS": ("fetch_hosts", "minio:9000, [::1]", ("minio:9000", "[::1]")),
    "FETCH_ALLOW_BUCKETS": ("fetch_buckets", "styles, more", ("styles", "more")),
    "CORS_ORIGINS": (
        "cors_origins",
        "https://a.example, https://b.example",
        ("https://a.example", "https://b.example"),
    ),
}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def test_defaults_need_nothing() -> None:
    settings = GatewayArgs()
    assert settings.jobs == "sqlite:///var/jobs.db"
    assert settings.outputs == "file://var/outputs"
    assert settings.loras == Path("var/loras")
    assert settings.checkpoints is None
    assert settings.base_url == "http://127.0.0.1:8000"
    assert settings.cors_origins == ()


@pytest.mark.parametrize("variable", VARIABLES)
def test_environment_wins_over_arguments(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    name, text, value = VARIABLES[variable]
    arguments = {
        "jobs": "sqlite:///argument.db",
        "outputs": "argument",
        "loras": "argument",
        "device": "cpu",
        "offload": "model",
        "vae_tiling": ["flux"],
        "inference_timeout_s": 5,
        "base_url": "http://argument",
        "cors_origins": ["http://argument"],
        "fetch_hosts": ["argument"],
        "fetch_buckets": ["argument"],
    }
    monkeypatch.setenv(variable, text)
    # Ray builds the arguments with model_validate.
    assert getattr(GatewayArgs.model_validate(arguments), name) == value


def test_an_empty_variable_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "")
    monkeypatch.setenv("CHECKPOINTS_PATH", "")
    settings = Settings.model_validate({"device": "cpu"})
    assert (settings.device, settings.checkpoints) == ("cpu", None)


def test_arguments_of_one_application_are_typed_and_known() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Settings.model_validate({"job": "sqlite:///typo.db"})
    with pytest.raises(ValidationError, match="'auto', 'cuda' or 'cpu'"):
        Settings.model_validate({"device": "tpu"})
    with pytest.raises(ValidationError, match="not a host or host:port: 'http://minio'"):
        Settings.model_validate({"fetch_hosts": ["http://minio"]})
    with pytest.raises(ValidationError, match="no such model: flix; choose from flux"):
        ModelsArgs.model_validate({"models": ["flux", "flix"]})
    with pytest.raises(ValidationError, match="Field required"):
        ModelsArgs.model_validate({})
    assert ModelsArgs.model_validate({"models": ["flux", "sd15"]}).models == ("flux", "sd15")


def test_a_token_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    assert "hf_very_secret" not in str(GatewayArgs().model_dump())


def test_the_password_of_the_job_table_is_not_in_repr() -> None:
    settings = GatewayArgs.model_validate({"jobs": "postgresql://me:hunter2@db/jobs"})
    assert "hunter2" not in repr(settings) + str(settings)


def test_settings_travel_to_replicas_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ModelsArgs.model_validate({"models": ["flux"], "device": "cpu"})
    travelled = pickle.dumps(settings)
    monkeypatch.setenv("DEVICE", "cuda")
    assert pickle.loads(travelled) == settings


@pytest.mark.parametrize("field", [{"fuse_after": {"flux": 3}}, {"compile": ["flux"]}])
def test_what_moves_is_neither_fused_nor_compiled(field: dict[str, Any]) -> None:
    assert ModelsArgs(models=("flux",), **field).offload == "none"
    with pytest.raises(ValidationError, match="offload must be none"):
        ModelsArgs(models=("flux",), offload="group", **field)


@pytest.mark.parametrize("field", [{"fuse_after": {"flux": 0}}, {"fuse_after": {"x": 1}}, {"compile": ["x"]}])
def test_fused_and_compiled_models_exist(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelsArgs(models=("flux",), **field)
