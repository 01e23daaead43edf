"""The fetcher against real servers on loopback, hostile ones first."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cluster.net.fetcher import Fetched, Fetcher
from cluster.net.limits import FetchError, FetchFault, Limits
from cluster.net.urls import parse_hosts, parse_url
from tests.support.web import Site, answer, redirect, serving_site

SECRET = "Sg7secret"

BRISK = Limits(total_s=3.0, grace_s=0.5, min_rate=1000.0, redirects=3)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving_site() as running:
        yield running


def fetch(
    site: Site, path: str, max_bytes: int = 10**6, limits: Limits = BRISK, **options: Any
) -> tuple[Fetched | None, bytes]:
    into = io.BytesIO()
    fetcher = Fetcher(parse_hosts([site.host]), limits)
    fetched = fetcher.fetch(parse_url(site.url(path)), into, max_bytes=max_bytes, **options)
    return fetched, into.getvalue()


def fault(site: Site, path: str, **options: Any) -> FetchFault:
    """Fetch a URL that must fail; assert that the error has no secret of the URL."""
    with pytest.raises(FetchError) as failed:
        fetch(site, f"{path}?sig={SECRET}", **options)
    assert SECRET not in str(failed.value) and path not in str(failed.value)
    assert str(failed.value).endswith(".")
    assert failed.value.retry == (failed.value.fault is FetchFault.UNREACHABLE)
    return failed.value.fault


def test_a_file_comes_with_its_hash_and_etag(site: Site) -> None:
    body = b"weights" * 50_000
    site.file("/a", body)
    fetched, data = fetch(site, "/a?x=1", token=SECRET)
    assert data == body
    assert fetched is not None
    assert (fetched.sha256, fetched.bytes) == (hashlib.sha256(body).hexdigest(), len(body))
    ((method, target, headers),) = site.requests
    assert (method, target, headers["Host"]) == ("GET", "/a?x=1", site.host)
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert fetch(site, "/a", etag=fetched.etag) == (None, b"")


def test_an_unlisted_loopback_server_is_never_reached(site: Site) -> None:
    site.file("/a", b"internal")
    for host in (site.host, f"localhost:{site.host.split(':')[1]}"):
        with pytest.raises(FetchError) as refused:
            Fetcher().fetch(parse_url(f"http://{host}/a"), io.BytesIO(), max_bytes=9)
        assert refused.value.fault is FetchFault.NOT_ALLOWED
    assert site.requests == []


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["1.1.1.1", "10.0.0.1"], ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"], ["fe80::1%lo"]],
)
def test_a_public_name_with_a_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    fetcher = Fetcher(resolve=lambda host, port: addresses)
    with pytest.raises(FetchError) as refused:
        fetcher.fetch(parse_url("http://files.example.com/a"), io.BytesIO(), max_bytes=9)
    assert refused.value.fault is FetchFault.NOT_ALLOWED


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name resolves to a public address when checked and to a private one afterwards."""
    answers = iter([["93.184.215.14"], ["127.0.0.1"]])
    connected: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], *_: object, **__: object) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    fetcher = Fetcher(resolve=lambda host, port: next(answers))
    with pytest.raises(FetchError) as failed:
        fetcher.fetch(parse_url("http://rebind.example.com/a"), io.BytesIO(), max_bytes=9)
    assert failed.value.fault is FetchFault.UNREACHABLE
    assert connected == [("93.184.215.14", 80)]
    assert next(answers) == ["127.0.0.1"], "resolved twice"


def test_a_name_is_resolved_anew_at_a_redirect(site: Site) -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.1"]])
    port = site.host.split(":")[1]
    site.pages["/a"] = redirect(f"http://rebind.example.com:{port}/b")
    site.file("/b", b"internal")
    fetcher = Fetcher(parse_hosts([f"first.example.com:{port}"]), BRISK, lambda *_: next(answers))
    with pytest.raises(FetchError) as refused:
        fetcher.fetch(parse_url(f"http://first.example.com:{port}/a"), io.BytesIO(), max_bytes=9)
    assert refused.value.fault is FetchFault.NOT_ALLOWED
    assert site.count("/a") == 1 and site.count("/b") == 0


def test_the_next_address_is_tried_where_one_refuses(site: Site) -> None:
    site.file("/a", b"there")
    fetcher = Fetcher(
        parse_hosts([f"files.test:{site.host.split(':')[1]}"]), BRISK, lambda *_: ["::1", "127.0.0.1"]
    )
    into = io.BytesIO()
    fetcher.fetch(parse_url(f"http://files.test:{site.host.split(':')[1]}/a"), into, max_bytes=9)
    assert into.getvalue() == b"there"


LEADS_ASTRAY = [
    "http://169.254.169.254/latest/meta-data/",
    "http://[::ffff:169.254.169.254]/",
    "http://127.0.0.1:6379/",
    "http://localhost/",
    "http://2130706433/",
    "http://user:password@example.com/",
    "http://good\\@evil/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "//169.254.169.254/",
]


@pytest.mark.parametrize("location", LEADS_ASTRAY)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_checked_like_the_first_url(site: Site, location: str, status: int) -> None:
    site.pages["/a"] = redirect(location, status)
    assert fault(site, "/a") is FetchFault.NOT_ALLOWED


def test_redirects_are_followed_and_bounded(site: Site) -> None:
    site.file("/end", b"there")
    site.pages["/1"] = redirect("/2")
    site.pages["/2"] = redirect(site.url("/3"))
    site.pages["/3"] = redirect("end")
    site.pages["/0"] = redirect("/1")
    site.pages["/loop"] = redirect("/loop")
    assert fetch(site, "/1")[1] == b"there"
    assert fault(site, "/0") is FetchFault.UNUSABLE
    assert fault(site, "/loop") is FetchFault.UNUSABLE
    assert site.count("/loop") == 4


def test_a_token_stays_with_its_origin(site: Site) -> None:
    with serving_site() as other:
        other.file("/b", b"there")
        site.pages["/a"] = redirect("/again")
        site.pages["/again"] = redirect(other.url("/b"))
        fetcher = Fetcher(parse_hosts([site.host, other.host]), BRISK)
        fetcher.fetch(parse_url(site.url("/a")), io.BytesIO(), max_bytes=9, token=SECRET)
        assert ["Authorization" in headers for _, _, headers in site.requests] == [True, True]
        assert ["Authorization" in headers for _, _, headers in other.requests] == [False]
        # A HEAD follows relative redirects only.
        headers = fetcher.head(parse_url(site.url("/a")), token=SECRET)
        assert headers["location"] == other.url("/b")
        assert len(other.requests) == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (404, FetchFault.NOT_FOUND),
        (410, FetchFault.NOT_FOUND),
        (401, FetchFault.DENIED),
        (403, FetchFault.DENIED),
        (408, FetchFault.UNREACHABLE),
        (429, FetchFault.UNREACHABLE),
        (500, FetchFault.UNREACHABLE),
        (503, FetchFault.UNREACHABLE),
        (204, FetchFault.UNUSABLE),
        (206, FetchFault.UNUSABLE),
        (304, FetchFault.UNUSABLE),
        (302, FetchFault.UNUSABLE),
        (400, FetchFault.UNUSABLE),
    ],
)
def test_what_is_no_200(site: Site, status: int, expected: FetchFault) -> None:
    site.pages["/a"] = lambda request: answer(request, status)
    assert fault(site, "/a") is expected


def test_bytes_are_bounded_whatever_the_server_says(site: Site) -> None:
    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        while True:
            request.wfile.write(b"x" * 65_536)

    def chunked(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        while True:
            request.wfile.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")

    site.pages["/endless"], site.pages["/chunked"] = endless, chunked
    site.pages["/huge"] = lambda request: answer(request, 200, Content_Length=str(10**12))
    for path in ("/endless", "/chunked", "/huge"):
        assert fault(site, path) is FetchFault.TOO_LARGE
    site.file("/exact", b"x" * 1000)
    assert len(fetch(site, "/exact", max_bytes=1000)[1]) == 1000
    assert fault(site, "/exact", max_bytes=999) is FetchFault.TOO_LARGE


def test_a_body_shorter_than_announced_is_an_error(site: Site) -> None:
    def cut_chunk(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(b"3e8\r\n" + b"x" * 10)

    site.pages["/a"] = lambda request: answer(request, 200, b"x" * 10, Content_Length="1000")
    site.pages["/b"] = cut_chunk
    for path in ("/a", "/b"):
        assert fault(site, path) is FetchFault.UNREACHABLE


def test_compressed_bodies_are_refused(site: Site) -> None:
    bomb = gzip.compress(b"\0" * 10**7)
    site.pages["/bomb"] = lambda request: answer(request, 200, bomb, Content_Encoding="gzip")
    assert fault(site, "/bomb") is FetchFault.UNUSABLE
    site.pages["/transfer"] = lambda request: answer(request, 200, bomb, Transfer_Encoding="gzip")
    assert fault(site, "/transfer") in (FetchFault.UNREACHABLE, FetchFault.UNUSABLE)
    site.pages["/plain"] = lambda request: answer(request, 200, b"there", Content_Encoding="identity")
    assert fetch(site, "/plain")[1] == b"there"


def drip(data: bytes) -> Any:
    def page(request: Any) -> None:
        for byte in data * 100:
            request.pause(0.1)
            request.wfile.write(bytes([byte]))

    return page


@pytest.mark.parametrize(
    "page",
    [
        lambda request: request.pause(60),
        drip(b"HTTP/1.1 200 OK\r\n"),
        lambda request: (answer(request, 200, Content_Length="9000"), drip(b"x")(request)),
        lambda request: (answer(request, 200, b"x" * 10, Content_Length="9000"), request.pause(60)),
    ],
    ids=["silent", "slow headers", "slow body", "stalled body"],
)
def test_slow_servers_are_left(site: Site, page: Any) -> None:
    site.pages["/a"] = page
    begun = time.monotonic()
    assert fault(site, "/a") is FetchFault.UNREACHABLE
    assert time.monotonic() - begun < 2.5


def test_the_time_of_a_fetch_is_bounded(site: Site) -> None:
    def steady(request: Any) -> None:
        request.send_response(200)
        request.end_headers()
        while True:
            request.pause(0.02)
            request.wfile.write(b"x" * 1000)

    site.pages["/a"] = steady
    begun = time.monotonic()
    assert fault(site, "/a", max_bytes=10**9, limits=Limits(total_s=1.0)) is FetchFault.UNREACHABLE
    assert 0.9 < time.monotonic() - begun < 2.0


def test_whoever_waits_can_end_a_fetch(site: Site) -> None:
    class Canceled(Exception):
        pass

    def tick() -> None:
        raise Canceled

    site.file("/a", b"x" * 10**6)
    with pytest.raises(Canceled):
        fetch(site, "/a", tick=tick)


def test_servers_that_are_not_there_or_no_http(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    for host in (closed, "nowhere.invalid"):
        with pytest.raises(FetchError) as failed:
            Fetcher(parse_hosts([host]), BRISK).fetch(parse_url(f"http://{host}/"), io.BytesIO(), max_bytes=1)
        assert failed.value.fault is FetchFault.UNREACHABLE
    site.pages["/a"] = lambda request: request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    assert fault(site, "/a") is FetchFault.UNREACHABLE


def test_the_environment_has_no_say(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.file("/a", b"there")
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(site, "/a")[1] == b"there"


def test_a_full_disk_is_no_fault_of_the_server(site: Site) -> None:
    site.file("/a", b"there")
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space"):
        Fetcher(parse_hosts([site.host])).fetch(parse_url(site.url("/a")), full, max_bytes=9)


def certificate(folder: Path, name: str) -> ssl.SSLContext:
    """Return a server's context for `name`, signed by itself; its certificate is in `folder`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, now, now + datetime.timedelta(1))
    alternative = x509.SubjectAlternativeName([x509.DNSName(name)])
    signed = builder.add_extension(alternative, critical=False).sign(key, SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def test_tls_is_with_the_name_while_the_address_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_site(certificate(tmp_path, "files.example.com")) as site:
        site.file("/a", b"there")
        port = site.host.split(":")[1]
        site.pages["/down"] = redirect(f"http://files.example.com:{port}/a")
        hosts = parse_hosts(["files.example.com", "other.example.com"])

        def get(name: str, path: str) -> bytes:
            into = io.BytesIO()
            fetcher = Fetcher(hosts, BRISK, lambda *_: ["127.0.0.1"])
            fetcher.fetch(parse_url(f"https://{name}:{port}{path}"), into, max_bytes=9)
            return into.getvalue()

        with pytest.raises(FetchError, match="no valid certificate") as untrusted:
            get("files.example.com", "/a")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert get("files.example.com", "/a") == b"there"
        with pytest.raises(FetchError) as misnamed:
            get("other.example.com", "/a")
        with pytest.raises(FetchError) as downgraded:
            get("files.example.com", "/down")
        faults = [error.value.fault for error in (untrusted, misnamed, downgraded)]
        assert faults == [FetchFault.UNUSABLE, FetchFault.UNUSABLE, FetchFault.NOT_ALLOWED]
        assert [headers["Host"] for _, _, headers in site.requests] == [f"files.example.com:{port}"] * 2


def test_fetches_run_beside_one_another(site: Site) -> None:
    site.file("/a", b"x" * 10**5)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(fetch(site, "/a")[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"x" * 10**5] * 8
