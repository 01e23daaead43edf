"""Files that the gateway serves from the output directory, and files that it must never serve."""

from __future__ import annotations

import hashlib
import socket

import pytest

from tests.serve_app.conftest import Service, body, kontext_body, png


def raw_get(service: Service, target: str) -> tuple[int, bytes]:
    """GET a target unchanged; an HTTP client would normalise it."""
    address = (service.client.base_url.host, service.client.base_url.port or 0)
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, content = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), content


def test_outputs_are_served_with_their_type(fresh: Service) -> None:
    claim = fresh.claim(fresh.submit(body(prompt={"width": 64, "height": 64})))
    fresh.publish(claim)
    (image,) = fresh.result(claim.job.id)["outputs"]["images"]
    files = {
        image["url"]: ("image/png", png(64, 64)),
        image["manifest_url"]: ("application/json", b'{"seed": 1}'),
    }
    for name, kind in (
        ("a.jpg", "image/jpeg"),
        ("a.webp", "image/webp"),
        ("a.html", "application/octet-stream"),
    ):
        fresh.store.put(f"{claim.job.id}/9/{name}", b"x", kind)
        files[f"/outputs/{claim.job.id}/9/{name}"] = (kind, b"x")
    for url, (kind, content) in files.items():
        answer = fresh.client.get(url.removeprefix("http://127.0.0.1:8000"))
        assert answer.status_code == 200
        assert answer.headers["content-type"] == kind
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.content == content


@pytest.mark.parametrize(
    "target",
    [
        "/outputs/",
        "/outputs/nothing.png",
        "/outputs/../jobs.db",
        "/outputs/%2e%2e/jobs.db",
        "/outputs/..%2fjobs.db",
        "/outputs/a/..%2f..%2fjobs.db",
        "/outputs//etc/passwd",
        "/outputs/%2fetc%2fpasswd",
        "/outputs/..%5cjobs.db",
        "/outputs/%00",
        "/outputs/a%00.png",
        "/outputs/" + "a" * 5000,
        "/outputs/folder",
        "/outputs/.hidden",
        "/outputs/link.db",
    ],
)
def test_nothing_but_outputs_is_served(service: Service, target: str) -> None:
    outputs = service.settings.loras.parent / "outputs"
    (outputs / "folder").mkdir(parents=True, exist_ok=True)
    (outputs / ".hidden").touch()
    if not (outputs / "link.db").is_symlink():
        (outputs / "link.db").symlink_to(service.settings.jobs.removeprefix("sqlite:///"))
    status, content = raw_get(service, target)
    assert status == 404
    assert b"SQLite" not in content and b"root:" not in content


def test_what_clients_sent_is_never_served(service: Service) -> None:
    job_id = service.submit(kontext_body())
    job = service.queue.get(job_id)
    assert job is not None
    (key,) = job.spec["prompts"][0]["controls"]
    assert service.store.exists(key)
    assert hashlib.sha256(png()).hexdigest() in key
    for target in (
        f"/outputs/{key}",
        f"/outputs/./{key}",
        f"/outputs/a/../{key}",
        f"/outputs/%69nputs/{key[7:]}",
    ):
        assert raw_get(service, target)[0] == 404
