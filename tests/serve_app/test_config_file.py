"""The rendered serve_config.yaml: up to date, limited to chosen models on request, valid for Ray Serve."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from deployments.catalog import CATALOG
from serve_app.cli.main import app
from serve_app.config_file import render_config

ROOT = Path(__file__).parents[2]


def test_the_committed_file_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["config"])
    assert printed.exit_code == 0
    assert printed.stdout == (ROOT / "serve_config.yaml").read_text(encoding="utf-8")


def test_it_is_a_valid_serve_config_with_one_application_per_family() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(render_config(list(CATALOG))))
    names = [application.name for application in config.applications]
    assert names == ["gateway", *dict.fromkeys(row.family for row in CATALOG.values())]
    prefixes = [application.route_prefix for application in config.applications]
    assert prefixes == ["/", *[None] * (len(names) - 1)]
    listed = [d.name for application in config.applications[1:] for d in application.deployments]
    assert sorted(listed) == sorted(CATALOG)


def test_models_narrows_it() -> None:
    printed = CliRunner().invoke(app, ["config", "--models", "sd15,flux"])
    config = yaml.safe_load(printed.stdout)
    assert [(a["name"], a["args"].get("models")) for a in config["applications"][1:]] == [
        ("flux", ["flux"]),
        ("sd", ["sd15"]),
    ]


def test_an_unknown_model_is_refused() -> None:
    printed = CliRunner().invoke(app, ["config", "--models", "flux,nope"])
    assert printed.exit_code == 2
    assert "nope" in printed.output


@pytest.mark.parametrize("model", sorted(CATALOG))
def test_every_worker_scales_from_zero_by_the_queue(model: str) -> None:
    for application in yaml.safe_load(render_config([model]))["applications"][1:]:
        for deployment in application["deployments"]:
            scaling = deployment["autoscaling_config"]
            assert scaling["min_replicas"] == 0
            assert scaling["policy"]["policy_function"] == "deployments.autoscaling:QueuePolicy"
            assert scaling["policy"]["policy_kwargs"]["model"] == deployment["name"]


def test_whoever_renders_the_preview_of_a_model_comes_with_it() -> None:
    config = yaml.safe_load(render_config(["flux2_diffusers"]))
    assert config["applications"][1]["args"]["models"] == ["flux2", "flux2_diffusers"]
