"""Whole jobs with remote files from a real server: the pictures match the golden ones."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from cluster.failures import FailureCode, JobFailure
from cluster.objects.directory import DirectoryStore
from deployments.engine.job import Report, render_job
from deployments.engine.media import decode_base64
from serve_app.admission.admit import FIRST_SEED, admit
from serve_app.cli.render import open_sources
from serve_app.settings import Settings
from serve_app.wire.requests import InferenceRequest
from tests.parity.cases import load_cases
from tests.support.studio import Studio, Unwatched
from tests.support.web import Site, answer, redirect, serving_site

SECRET = "Sg7secret"


@pytest.fixture
def site() -> Iterator[Site]:
    with serving_site() as running:
        yield running


@pytest.fixture
def settings(site: Site, tmp_path: Path) -> Settings:
    return Settings.model_validate(
        {
            "loras": tmp_path / "loras",
            "lora_cache": tmp_path / "cache",
            "fetch_hosts": [site.host],
            "max_image_pixels": 1_000_000,
        }
    )


def test_a_job_of_urls_gives_the_golden_pictures(
    site: Site, settings: Settings, studio: Callable[[str], Studio], tmp_path: Path
) -> None:
    case = next(case for case in load_cases() if case.model == "flux_kontext")
    request = copy.deepcopy(case.request)
    for item in request["loras"]:
        url = site.file(f"/{item['path']}", (case.loras / item["path"]).read_bytes())
        item["path"] = f"{url}?sig={SECRET}"
    for prompt in request["prompts"]:
        for name in [name for name in prompt if name.startswith("ctrl_img")]:
            prompt[name] = f"{site.file(f'/{name}.png', decode_base64(prompt[name]))}?sig={SECRET}"
    request["prompts"] = [{"seed": FIRST_SEED, **request["prompts"][0]}] * 2
    store = DirectoryStore(tmp_path / "outputs")
    # Like `lora-serve render`: without stored jobs there is no need for a SECRET_KEY.
    spec = admit(InferenceRequest.model_validate(request), settings, store, kept=False)
    assert spec.prompts[0].controls[0].startswith("http://")
    loras, controls = open_sources(settings, store)
    engine = studio(case.model).engine
    job = render_job(engine, spec, loras=loras, controls=controls, observer=Unwatched(), report=Report())
    first, second = list(job)
    case.check([first.media.pixels])
    case.check([second.media.pixels])
    assert site.count("/ctrl_img.png") == 1, "prompts in a row share their images"
    assert SECRET not in str(first.manifest)
    assert first.manifest["parameters"]["controls"] == (site.url("/ctrl_img.png"),)


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/missing", FailureCode.CONTROL_IMAGE_UNREACHABLE),
        ("/sick", FailureCode.CONTROL_IMAGE_UNREACHABLE),
        ("/page", FailureCode.CONTROL_IMAGE_INVALID),
        ("/empty", FailureCode.CONTROL_IMAGE_INVALID),
        ("/cut", FailureCode.CONTROL_IMAGE_INVALID),
        ("/large", FailureCode.CONTROL_IMAGE_TOO_LARGE),
        ("/heavy", FailureCode.CONTROL_IMAGE_TOO_LARGE),
        ("/astray", FailureCode.URL_NOT_ALLOWED),
    ],
)
def test_control_images_that_cannot_be_used(
    site: Site, settings: Settings, tmp_path: Path, path: str, code: FailureCode
) -> None:
    site.pages["/sick"] = lambda request: answer(request, 500)
    site.pages["/astray"] = redirect("http://169.254.169.254/")
    site.pages["/heavy"] = lambda request: answer(request, 200, Content_Length=str(2**30))
    site.file("/page", b"<html>")
    site.file("/empty", b"")
    site.file("/cut", picture(64, 64)[:60])
    site.file("/large", picture(1001, 1000))
    _, controls = open_sources(settings, DirectoryStore(tmp_path))
    with pytest.raises(JobFailure) as failed:
        controls.open(f"{site.url(path)}?sig={SECRET}", lambda: None)
    assert (failed.value.code, failed.value.retry) == (code, path == "/sick")
    assert SECRET not in failed.value.message


def test_control_images_of_the_store_and_the_web_are_one(
    site: Site, settings: Settings, tmp_path: Path
) -> None:
    data = picture(1000, 1000)
    store = DirectoryStore(tmp_path)
    store.put("inputs/a", data, "image/png")
    _, controls = open_sources(settings, store)
    found = [controls.open(name, lambda: None).tobytes() for name in ("inputs/a", site.file("/a", data))]
    assert found[0] == found[1]
