"""Every golden case through `lora-serve render`, the command for reproducing mismatches."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from deployments.catalog import CATALOG
from deployments.engine.videos import Sound
from serve_app.cli.main import app
from tests.parity.cases import FOLDER, Case, load_cases, load_previews

CASES = load_cases() + load_previews()


@pytest.fixture(scope="module")
def rendered(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run the command in this process, once for all cases of an id; return the folder of the results."""

    @cache
    def render(model: str) -> Path:
        folder = tmp_path_factory.mktemp(model)
        files = [folder / f"{case.name}.json" for case in CASES if case.model == model]
        for case, file in zip((case for case in CASES if case.model == model), files, strict=True):
            file.write_text(json.dumps(case.request))
        places = ["--checkpoints", checkpoints, "--loras", FOLDER / model / "lora", "--out", folder / "out"]
        arguments = ["render", *files, *places, "--device", "cpu", "--format", "npy"]
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        return folder / "out"

    return render


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case: Case, rendered: Callable[[str], Path]) -> None:
    folder = rendered(case.model) / case.name
    case.check(np.load(folder / f"{index}.npy") for index in range(len(case.files)))
    rates = [rate for _, rate in case.sounds]
    samples = (np.load(folder / f"{index}.audio.npy") for index in range(len(rates)))
    case.check_sounds(map(Sound, samples, rates))
    manifest = json.loads((folder / "manifest.json").read_text())
    sampling = case.request.get("sampling", "reference")
    recorded = [output["parameters"] for output in manifest["outputs"]]
    assert tuple(parameters["seed"] for parameters in recorded) == case.seeds
    assert {parameters["sampling"] for parameters in recorded} == {sampling}
    assert manifest["model"] == CATALOG[case.model].sampled(sampling).id
    assert "error" not in manifest
