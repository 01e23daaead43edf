"""The files of the page: how they are served, and that they load or run nothing from other origins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serve_app.gateway.page_files import FOLDER
from tests.serve_app.conftest import Service, serving

FILES = sorted(FOLDER.iterdir())


def test_the_page_may_load_its_own_files_only(service: Service) -> None:
    answer = service.client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"].split("; ")
    assert policy[:3] == ["default-src 'none'", "script-src 'self'", "style-src 'self'"]
    assert "connect-src 'self' http://127.0.0.1:8000" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_outputs_in_s3_are_shown_from_there(tmp_path: Path, s3_url: str, s3_server: object) -> None:
    with serving(tmp_path, outputs=s3_url) as service:
        policy = service.client.get("/").headers["content-security-policy"]
    assert re.search(r"img-src blob: 'self' http://127\.0\.0\.1:\d+;", policy)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_file(service: Service, file: Path) -> None:
    answer = service.client.get(f"/page/{file.name}")
    assert answer.content == file.read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    text = file.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|style=", text)
    # A placeholder, and the name of a format.
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"https://…", "http://www.w3.org/2000/svg"}
    assert len(text.splitlines()) < 300


@pytest.mark.parametrize("name", ["none.js", "..%2fpage_files.py", "%2e%2e/page_files.py", "index.html/"])
def test_there_is_nothing_else(service: Service, name: str) -> None:
    assert service.client.get(f"/page/{name}").status_code in (307, 404)
