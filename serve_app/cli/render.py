"""`lora-serve render`: render requests from files with the worker's code, without Ray or a server."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from cluster.failures import JobFailure
from cluster.net.fetcher import Fetcher
from cluster.net.urls import parse_hosts
from cluster.objects.directory import DirectoryStore
from cluster.objects.store import ObjectStore
from deployments.catalog import CATALOG
from deployments.engine.control_images import Controls
from deployments.engine.engine import Engine
from deployments.engine.job import Rendered, Report, Unwatched, render_job
from deployments.engine.media import save
from deployments.loras.sources.loras import Loras
from deployments.settings import RenderSettings
from deployments.spec.formats import FILE_TYPES, FileFormat
from serve_app.admission.admit import admit, check_format
from serve_app.settings import RenderArgs
from serve_app.wire.refusals import Refusal
from serve_app.wire.requests import InferenceRequest


def render_files(files: Sequence[Path], settings: RenderArgs, out: Path, file_format: FileFormat) -> int:
    """Render the requests in order in this process, with one engine per model; return the exit status.

    For request `A.json` (a body of `POST /v1/inference`) this writes `out/A/manifest.json` and one file per
    prompt. With `npy` that is `out/A/0.npy`: uint8 H x W x 3, or F x H x W x 3 for a video, whose sound is in
    `0.audio.npy`: float32 [channels, samples] in [-1, 1]. With png, jpeg, webp or mp4 it is a picture or
    video. If a request fails, its manifest has `error` and `error_code`, the error is printed on stderr, and
    the other requests are still rendered.
    """
    engines: dict[str, Engine] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        store = DirectoryStore(Path(scratch))
        for file in files:
            folder = out / file.stem
            folder.mkdir(parents=True, exist_ok=True)
            manifest = _render_file(file, settings, store, engines, folder, file_format)
            if "error" in manifest:
                failed += 1
                print(f"{file}: {manifest['error_code']}: {manifest['error']}", file=sys.stderr)
            text = json.dumps({"request": file.name, **manifest}, indent=2, ensure_ascii=False)
            (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return 1 if failed else 0


def open_sources(settings: RenderSettings, store: ObjectStore) -> tuple[Loras, Controls]:
    """Return the LoRA and control image sources that a worker uses."""
    fetcher = Fetcher(parse_hosts(settings.fetch_hosts))
    return Loras.of(settings, fetcher), Controls(store, fetcher, settings.max_image_pixels)


def _render_file(
    file: Path,
    settings: RenderArgs,
    store: ObjectStore,
    engines: dict[str, Engine],
    folder: Path,
    file_format: FileFormat,
) -> dict[str, Any]:
    try:
        request = InferenceRequest.model_validate_json(file.read_bytes())
        spec = admit(request, settings, store, kept=False)
        if file_format != "npy":
            check_format(file_format, CATALOG[spec.model])
        engine = _engine(spec.model, settings, engines)
        report = Report()
        loras, controls = open_sources(settings, store)
        rendered = render_job(
            engine,
            spec,
            loras=loras,
            controls=controls,
            observer=Unwatched(),
            report=report,
            hf_token=request.hf_token,
        )
        outputs = [_write(item, folder, file_format) for item in rendered]
    except OSError as error:
        return {"error": f"{error.strerror}: {error.filename}", "error_code": "FILE_ERROR"}
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return {"error": faults, "error_code": "INVALID_REQUEST"}
    except Refusal as refusal:
        return {"error": refusal.message, "error_code": refusal.code, "details": refusal.details}
    except JobFailure as failure:
        return {"error": failure.message, "error_code": failure.code}
    warnings = [*spec.warnings, *report.warnings]
    return {"model": spec.model, "outputs": outputs, "warnings": warnings, "timings": report.timings}


def _engine(model: str, settings: RenderArgs, engines: dict[str, Engine]) -> Engine:
    if model not in engines:
        engine = Engine.of(model, settings)
        engine.load()
        engines[model] = engine
    return engines[model]


def _write(item: Rendered, folder: Path, file_format: FileFormat) -> dict[str, Any]:
    """Write the output of a prompt and return its manifest. `npy` stores pixels and sound before encoding."""
    if file_format == "npy":
        name = f"{item.index}.npy"
        np.save(folder / name, item.media.pixels)
        if item.media.sound is not None:
            np.save(folder / f"{item.index}.audio.npy", item.media.sound.samples)
    else:
        name = f"{item.index}.{FILE_TYPES[file_format][0]}"
        save(item.media, file_format, item.manifest, folder / name)
    return {"file": name, **item.manifest}
