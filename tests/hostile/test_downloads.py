"""Inputs 9 to 16, 36 and 59: LoRA URLs with misbehaving servers."""

from __future__ import annotations

import gzip
import hashlib
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from tests.hostile.conftest import LORA, MAX_LORA_BYTES, QUERY, TOKEN, Stage, request
from tests.support.web import Page, answer, redirect

DATA = LORA.read_bytes()

PAGE = b"<!DOCTYPE html><html>Sign in to continue</html>"

BOMB = gzip.compress(bytes(50_000_000))


def lengthless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(DATA)


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(2**20))


def dripping(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(DATA)))
    handler.end_headers()
    for index in range(len(DATA)):
        handler.wfile.write(DATA[index : index + 1])
        handler.wfile.flush()
        handler.pause(0.2)


def claiming(length: str) -> Page:
    return lambda handler: answer(handler, 200, DATA, Content_Length=length)


PAGES: dict[str, tuple[Page, str | None]] = {
    "10 a login page": (lambda handler: answer(handler, 200, PAGE), "LORA_URL_IS_HTML"),
    "13 length too small": (claiming(str(len(DATA) - 9)), "LORA_FORMAT_NOT_SUPPORTED"),
    "13 length too large": (claiming(str(len(DATA) + 9)), "LORA_UNREACHABLE"),
    "13 no length": (lengthless, None),
    "13 no length and no end": (endless, "LORA_TOO_LARGE"),
    "13 length of 1 TB": (claiming(str(10**12)), "LORA_TOO_LARGE"),
    "13 length that is no number": (claiming("many"), "LORA_UNREACHABLE"),
    "13 length below 0": (claiming("-1"), "LORA_UNREACHABLE"),
    "13 one byte too many": (
        lambda handler: answer(handler, 200, bytes(MAX_LORA_BYTES + 1)),
        "LORA_TOO_LARGE",
    ),
    "14 a byte at a time": (dripping, "LORA_UNREACHABLE"),
    "15 a bomb": (lambda handler: answer(handler, 200, BOMB, Content_Encoding="gzip"), "LORA_UNREACHABLE"),
    "16 a loop": (lambda handler: answer(handler, 302, Location=handler.path), "LORA_UNREACHABLE"),
    "16 to the metadata service": (redirect("http://169.254.169.254/latest"), "URL_NOT_ALLOWED"),
    "16 to a file": (redirect("file:///etc/passwd"), "URL_NOT_ALLOWED"),
    "16 to Ray": (redirect("http://127.0.0.1:8265/api/jobs/"), "URL_NOT_ALLOWED"),
    "16 to nowhere": (lambda handler: answer(handler, 302), "LORA_UNREACHABLE"),
    "59 an expired presigned URL": (lambda handler: answer(handler, 403, b"<Error/>"), "LORA_ACCESS_DENIED"),
    "59 a bucket that is gone": (lambda handler: answer(handler, 404, b"<Error/>"), "LORA_NOT_FOUND"),
}


@pytest.mark.parametrize("name", PAGES)
def test_servers(stage: Stage, name: str) -> None:
    page, code = PAGES[name]
    path = f"/server/{name.replace(' ', '-')}"
    stage.site.pages[path] = page
    assert stage.outcome(request(stage.site.url(path) + QUERY)) == code


@pytest.mark.parametrize("host", ["rebound.example", "half.example"])
def test_36_a_public_name_with_a_private_address(stage: Stage, host: str) -> None:
    url = f"http://{host}/a"
    assert stage.outcome(request(url + QUERY)) == "URL_NOT_ALLOWED"
    assert stage.outcome(request(prompt={"ctrl_img": url + QUERY})) == "URL_NOT_ALLOWED"


def test_11_another_hash_than_declared(stage: Stage) -> None:
    url = stage.site.file("/hashed", DATA)
    assert stage.outcome(request(url, lora={"sha256": "0" * 64})) == "LORA_HASH_MISMATCH"
    assert stage.outcome(request(url, lora={"sha256": hashlib.sha256(DATA).hexdigest().upper()})) is None


def test_9_a_page_of_the_hub_means_its_file(stage: Stage) -> None:
    """Only the hub gets the request's token."""
    path = "/hub/org/repo/resolve/main/style.safetensors"
    stage.site.file(path, DATA)
    before = len(stage.site.requests)
    assert stage.outcome(request("https://huggingface.co/org/repo/blob/main/style.safetensors")) is None
    sent = [headers.get("Authorization") for _, _, headers in stage.site.requests[before:]]
    assert sent and set(sent) == {f"Bearer {TOKEN}"}
    stage.outcome(request(stage.site.file("/elsewhere", DATA)))
    assert "Authorization" not in stage.site.requests[-1][2]
