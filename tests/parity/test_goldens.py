"""Every golden case through the numeric path that workers and `lora-serve render` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.objects import DirectoryStore
from deployments.rendering import Report, render_job
from serve_app.admission import admit
from serve_app.render import open_sources
from serve_app.schemas import InferenceRequest
from serve_app.settings import Settings
from tests.parity.cases import Case, load_cases, load_previews
from tests.studio import Studio, Unwatched


@pytest.mark.parametrize("case", load_cases() + load_previews(), ids=str)
def test_golden(case: Case, studio: Callable[[str], Studio], tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    settings = Settings(loras=case.loras)
    spec = admit(InferenceRequest.model_validate(case.request), settings, store)
    engine, report = studio(spec.model).engine, Report()
    loras, controls = open_sources(settings, store)
    job = render_job(engine, spec, loras=loras, controls=controls, observer=Unwatched(), report=report)
    rendered = list(job)
    case.check([item.media.pixels for item in rendered])
    told = [item.manifest["parameters"] for item in rendered]
    assert tuple(parameters["seed"] for parameters in told) == case.seeds
    assert {parameters["sampling"] for parameters in told} == {case.request.get("sampling", "reference")}
    assert report.warnings == []
