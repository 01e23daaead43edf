"""The client under faults: lost answers, restarts, busy servers, broken downloads."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from cluster.jobs.model import JobState
from serve_app.client import DownloadFailed, LoraServe, LoraServeError, Output, Refused, Status, Unreachable
from tests.serve_app.conftest import Service, body, listening, serving
from tests.support.reference import create_reference
from tests.support.s3 import Proxy, cut_after_receiving
from tests.support.service import free_port
from tests.support.web import Page, Site, answer, serving_site

MODELS = b'{"models": []}'


@pytest.fixture
def site() -> Iterator[Site]:
    with serving_site() as running:
        yield running


def client_of(site: Site, patience_s: float = 30) -> LoraServe:
    return LoraServe(f"http://{site.host}", patience_s=patience_s)


def one_after_another(*pages: Page) -> Page:
    """Return a page that answers with each of `pages` once, in order."""
    following = iter(pages)
    return lambda request: next(following)(request)


def busy(status: int, retry_after: str, body: bytes = b"") -> Page:
    return lambda request: answer(request, status, body, Retry_After=retry_after)


def good(request: BaseHTTPRequestHandler) -> None:
    answer(request, 200, MODELS)


def test_a_submit_whose_answer_was_lost_makes_one_job(fresh: Service) -> None:
    proxy = Proxy(str(fresh.client.base_url))
    proxy.faults.append(cut_after_receiving(1))
    with LoraServe(proxy.url) as client:
        submitted = client.submit(body())
    proxy.close()
    assert [job.id for job in fresh.queue.list(None)] == [submitted.request_id]


def test_without_keys_a_lost_answer_is_told(tmp_path: Path) -> None:
    reference = create_reference(tmp_path)
    with listening(reference) as url:
        proxy = Proxy(url)
        proxy.faults.append(cut_after_receiving(1))
        with LoraServe(proxy.url) as client, pytest.raises(Unreachable) as caught:
            client.submit(body())
        proxy.close()
    assert caught.value.code == "CONNECTION_LOST" and len(reference.state.jobs) == 1


def test_waiting_survives_a_restart_of_the_gateway(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    seen: list[Status] = []
    with ThreadPoolExecutor(1) as pool, LoraServe(url) as client:
        with serving(tmp_path, port, base_url=url):
            job_id = client.submit(body()).request_id
            waiting = pool.submit(client.wait, job_id, on_status=seen.append)
            while not seen:
                time.sleep(0.02)
        time.sleep(0.5)
        with serving(tmp_path, port, base_url=url) as again:
            again.publish(again.claim(job_id))
            assert waiting.result(30).status is JobState.SUCCEEDED


def test_a_full_queue_is_told_when_patience_is_shorter_than_it_asks(tmp_path: Path) -> None:
    with serving(tmp_path, max_queued=1) as service:
        service.submit()
        time.sleep(1.1)  # The gateway caches its count of waiting jobs for a second.
        begun = time.monotonic()
        with (
            LoraServe(str(service.client.base_url), patience_s=5) as client,
            pytest.raises(Refused) as caught,
        ):
            client.submit(body())
    assert (caught.value.status, caught.value.code) == (429, "TOO_MANY_QUEUED")
    assert caught.value.details["most"] == 1 and time.monotonic() - begun < 5


def test_a_busy_server_is_asked_again_when_it_says(site: Site) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    site.pages["/v1/models"] = one_after_another(busy(429, "1"), busy(503, soon), busy(503, "soon"), good)
    begun = time.monotonic()
    assert client_of(site).models() == []
    assert 2 < time.monotonic() - begun < 10
    assert site.count("/v1/models") == 4


def test_a_proxy_that_lost_the_gateway_is_asked_again(site: Site) -> None:
    def gone(request: BaseHTTPRequestHandler) -> None:
        answer(request, 502, b"<html>Bad Gateway</html>")

    def cut(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")

    site.pages["/v1/models"] = one_after_another(gone, cut, good)
    assert client_of(site).models() == []
    site.pages["/v1/batches"] = gone
    with pytest.raises(Refused) as caught:
        client_of(site).send("POST", "/v1/batches", body={})
    assert caught.value.code == "HTTP_502" and site.count("/v1/batches") == 1


def test_the_services_own_errors_are_final(site: Site) -> None:
    own = b'{"detail": {"error": {"code": "INTERNAL_ERROR", "message": "It failed.", "details": {}}}}'
    site.pages["/v1/models"] = lambda request: answer(request, 500, own)
    with pytest.raises(Refused) as caught:
        client_of(site).models()
    assert str(caught.value) == "INTERNAL_ERROR: It failed." and site.count("/v1/models") == 1


@pytest.mark.parametrize("page", [b"<html>", b"[]", b'{"models": [{"id": 1}]}'])
def test_what_is_not_this_service_is_told(site: Site, page: bytes) -> None:
    site.pages["/v1/models"] = lambda request: answer(request, 200, page)
    with pytest.raises(Exception, match="ANSWER_INVALID"):
        client_of(site).models()


def test_nobody_there() -> None:
    begun = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        LoraServe(f"http://127.0.0.1:{free_port()}", patience_s=1).models()
    assert caught.value.code == "UNREACHABLE" and time.monotonic() - begun < 5


def output(site: Site, data: bytes, **changes: Any) -> Output:
    fields = {"format": "png", "width": 1, "height": 1, "file_path": "/nowhere/0.png", "seed": 1}
    stored = {
        "url": site.url("/outputs/0.png"),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    return Output.model_validate({**fields, **stored, **changes})


def test_a_download_that_breaks_off_begins_anew(site: Site, tmp_path: Path) -> None:
    data = b"picture" * 100_000

    def cut(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data[:300_000])

    site.pages["/outputs/0.png"] = one_after_another(cut, lambda request: answer(request, 200, data))
    client = LoraServe(f"http://{site.host}", "k" * 40)
    path = client.download(output(site, data), tmp_path / "new" / "0.png")
    assert path.read_bytes() == data and list(path.parent.iterdir()) == [path]
    assert all("Authorization" not in headers for _, _, headers in site.requests)


def test_a_download_with_another_hash_leaves_what_was_there(site: Site, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"before")
    site.pages["/outputs/0.png"] = lambda request: answer(request, 200, b"after")
    with pytest.raises(DownloadFailed) as caught:
        client_of(site).download(output(site, b"other"), tmp_path / "0.png")
    assert caught.value.code == "SHA256_MISMATCH"
    del site.pages["/outputs/0.png"]
    with pytest.raises(Refused) as refused:
        client_of(site).download(output(site, b"other"), tmp_path / "0.png")
    assert refused.value.status == 404
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("0.png", b"before")]


@pytest.mark.parametrize("name", ["../x", "a/b", ""])
def test_no_server_chooses_a_directory(site: Site, name: str) -> None:
    image = output(site, b"").model_dump() | {"format": name}
    job = {"request_id": "a", "status": "succeeded", "created_at": "2026-01-01T00:00:00Z"}
    page = json.dumps({**job, "outputs": {"images": [image], "videos": []}}).encode()
    site.pages["/v1/requests/a/result"] = lambda request: answer(request, 200, page)
    with pytest.raises(LoraServeError, match="ANSWER_INVALID"):
        client_of(site).result("a")


def test_without_a_url_only_a_path_of_this_machine_helps(site: Site, tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(b"picture")
    there = output(site, b"picture", url=None, file_path=str(tmp_path / "there.png"))
    assert client_of(site).download(there, tmp_path / "here.png").read_bytes() == b"picture"
    with pytest.raises(DownloadFailed, match="NO_URL"):
        client_of(site).download(output(site, b"", url=None), tmp_path / "x.png")


def test_the_reference_server_is_served_too(tmp_path: Path) -> None:
    with listening(create_reference(tmp_path)) as url, LoraServe(url) as client:
        assert [model.id for model in client.models()] == ["flux"]
        two = {"model": "flux", "loras": [{"path": "a"}], "prompts": [{"prompt": "a"}, {"prompt": "b"}]}
        first, second = client.generate(two)
        assert first.size == second.size == (64, 48) and first.tobytes() != second.tobytes()  # type: ignore
        submitted = client.submit(two)
        assert submitted.created_at.tzinfo is not None
        assert client.status(submitted.request_id).status is JobState.IN_QUEUE
        ended = client.wait(submitted.request_id)
        assert ended.finished_at is not None and ended.finished_at > submitted.created_at
        with pytest.raises(Exception, match="JOB_FAILED: Something went wrong"):
            client.generate({**two, "prompts": [{"prompt": "fail"}]})
        with pytest.raises(Refused) as caught:
            client.submit({**two, "model": "x"})
        assert caught.value.code == "MODEL_NOT_FOUND"
        with pytest.raises(Refused) as caught:
            client.submit({**two, "loras": [{"path": "a"}, {"path": "b"}]})
        assert caught.value.code == "HTTP_500"
        with pytest.raises(Refused) as caught:
            client.cancel(submitted.request_id)
        assert caught.value.status in (404, 405)
