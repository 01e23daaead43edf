"""`POST /v1/loras/inspect` and `lora-serve inspect`: files, URLs and refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.loras.format.header import MAX_HEADER_BYTES
from tests.deployments.loras.format.listings import LISTINGS, bytes_of
from tests.parity.cases import FOLDER
from tests.serve_app.conftest import Service, serving
from tests.support.web import Page, Site, answer, serving_site

SECRET = "Sg7secret"

HEADER = LISTINGS["flux, trainer"].header()
START = bytes_of(HEADER)


class Weights:
    """A file too large to send: its header, then zeros for as long as the client reads."""

    def __init__(self, ranges: bool) -> None:
        self.ranges = ranges
        self.sent = 0

    def __call__(self, request: BaseHTTPRequestHandler) -> None:
        total = len(START) + 2 * sum(
            tensor.items for tensor in LISTINGS["flux, trainer"].header().tensors.values()
        )
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if self.ranges and asked:
            first, last = int(asked[1]), int(asked[2])
            body = START[first : last + 1]
            self.sent += len(body)
            span = f"bytes {first}-{first + len(body) - 1}/{total}"
            answer(request, 206, body, Content_Range=span)
            return
        request.send_response(200)
        request.send_header("Content-Length", str(total))
        request.end_headers()
        request.wfile.write(START)
        while True:  # Until the client disconnects.
            request.wfile.write(bytes(2**16))
            self.sent += 2**16


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving_site() as running:
        yield running


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, fetch_hosts=[site.host]) as running:
        yield running


def inspect(service: Service, path: str, **fields: Any) -> httpx.Response:
    before = service.stored
    found = service.client.post("/v1/loras/inspect", json={"path": path, **fields})
    assert service.stored == before
    assert SECRET not in found.text
    return found


def test_a_file_below_the_lora_root(service: Service) -> None:
    file = FOLDER / "flux" / "lora" / "tiny_a.safetensors"
    (service.settings.loras / "tiny.safetensors").write_bytes(file.read_bytes())
    found = inspect(service, "tiny.safetensors").raise_for_status().json()
    assert (found["dialect"], found["alpha_tensors"]) == ("peft", 0)
    # Its layers have the names of FLUX.1's but other sizes.
    flux = next(entry for entry in found["models"] if entry["model"] == "flux")
    assert (flux["fit"], flux["matched"], flux["misfits"]) == ("none", 0, found["modules"])


@pytest.mark.parametrize("ranges", [True, False])
def test_of_a_url_only_the_header_is_read(service: Service, site: Site, ranges: bool) -> None:
    page = Weights(ranges)
    site.pages["/style.safetensors"] = page
    before = len(site.requests)
    found = inspect(service, f"{site.url('/style.safetensors')}?sig={SECRET}").raise_for_status().json()
    assert (found["modules"], found["fitting_models"]) == (494, ["flux", "flux_kontext"])
    asked = [headers["Range"] for _, _, headers in site.requests[before:]]
    assert asked == ["bytes=0-7", f"bytes=8-{len(START) - 1}"]
    # The client cannot control how much is sent into the connection's buffers before it closes.
    assert page.sent == len(START) if ranges else page.sent < 32 * 2**20


def _page(status: int, body: bytes = b"", **headers: str) -> Page:
    return lambda request: answer(request, status, body, **headers)


REFUSED: dict[str, tuple[Page, int, str]] = {
    "a page": (_page(200, b" \n<!DOCTYPE html><html>Sign in"), 400, "LORA_URL_IS_HTML"),
    "nothing": (_page(200), 400, "LORA_FORMAT_NOT_SUPPORTED"),
    "a pickle": (_page(200, b"\x80\x02}q\x00.     "), 400, "LORA_FORMAT_NOT_SUPPORTED"),
    "a long header": (
        _page(200, (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" * 100),
        400,
        "LORA_FORMAT_NOT_SUPPORTED",
    ),
    "half a header": (_page(200, START[: len(START) // 2]), 400, "LORA_FORMAT_NOT_SUPPORTED"),
    "no weights": (_page(200, START), 400, "LORA_FORMAT_NOT_SUPPORTED"),
    "an empty range": (_page(416), 400, "LORA_FORMAT_NOT_SUPPORTED"),
    "another range": (_page(206, START, Content_Range="bytes 100-200/300"), 502, "LORA_UNREACHABLE"),
    "a compressed body": (_page(200, START, Content_Encoding="gzip"), 502, "LORA_UNREACHABLE"),
    "an account": (_page(401), 400, "LORA_ACCESS_DENIED"),
    "gone": (_page(404), 400, "LORA_NOT_FOUND"),
    "broken": (_page(500), 502, "LORA_UNREACHABLE"),
    "inside": (_page(302, Location="http://169.254.169.254/latest"), 400, "URL_NOT_ALLOWED"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_of_a_url(service: Service, site: Site, name: str) -> None:
    page, status, code = REFUSED[name]
    site.pages["/a"] = page
    found = inspect(service, f"{site.url('/a')}?sig={SECRET}", hf_token=SECRET)
    assert (found.status_code, found.json()["detail"]["error"]["code"]) == (status, code)
    assert found.json()["detail"]["error"]["details"]["lora_path"] == "http://***"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("../outside.safetensors", "LORA_PATH_NOT_ALLOWED"),
        ("missing.safetensors", "LORA_NOT_FOUND"),
        ("style.pt", "LORA_NOT_FOUND"),
        ("http://127.0.0.1:8265/a.safetensors", "URL_NOT_ALLOWED"),
        ("s3://other/a.safetensors", "URL_NOT_ALLOWED"),
        ("https://huggingface.co/org/repo/tree/main", "LORA_URL_IS_DIRECTORY"),
        ("https://host.example/a.ckpt", "LORA_FORMAT_NOT_SUPPORTED"),
    ],
)
def test_what_the_path_itself_shows(service: Service, path: str, code: str) -> None:
    found = inspect(service, path)
    assert (found.status_code, found.json()["detail"]["error"]["code"]) == (400, code)


def test_a_body_of_another_shape(service: Service) -> None:
    assert service.client.post("/v1/loras/inspect", json={"file": "a"}).status_code == 422


def command(lora: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from serve_app.cli.main import main; main()", "inspect", lora],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_command_line(tmp_path: Path) -> None:
    done = command(str(FOLDER / "sdxl" / "lora" / "style_a.safetensors"), tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["dialect"], found["ranks"], found["alphas"]) == ("kohya", [4], [4.0])
    (tmp_path / "a.safetensors").write_bytes(START)
    done = command("a.safetensors", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "LORA_FORMAT_NOT_SUPPORTED: The LoRA file is truncated" in done.stderr
    done = command("http://127.0.0.1/a.safetensors", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "URL_NOT_ALLOWED" in done.stderr
