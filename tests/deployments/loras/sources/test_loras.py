"""LoRAs from real servers (web, hub and S3), and what can go wrong with each."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, BinaryIO

import boto3
import numpy as np
import pytest
from safetensors.numpy import save

from cluster.failures import FailureCode, JobFailure
from cluster.net.fetcher import Fetched, Fetcher
from cluster.net.limits import Limits
from cluster.net.urls import Url, parse_hosts
from deployments.loras.sources.disk_cache import LoraStore
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.loras import Loras
from deployments.spec.job import LoraSpec
from deployments.spec.lora_reference import parse
from tests.support.service import free_port
from tests.support.web import Site, answer, redirect, serving_site

SECRET = "Sg7secret"


def lora(value: float = 1.0, rank: int = 2, size: int = 4) -> bytes:
    down, up = np.full((rank, size), value, np.float32), np.ones((size, rank), np.float32)
    return save({"a.lora_A.weight": down, "a.lora_B.weight": up})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving_site() as running:
        yield running


@pytest.fixture
def loras(site: Site, tmp_path: Path) -> Loras:
    return open_loras(site, tmp_path)


def open_loras(site: Site, folder: Path, **options: Any) -> Loras:
    fetcher = Fetcher(parse_hosts(["127.0.0.1"]), Limits(total_s=5.0, grace_s=1.0))
    store = LoraStore(folder / "cache", options.pop("budget", 10**6))
    return Loras(
        folder / "loras",
        store,
        fetcher,
        hub=site.url(""),
        **{"max_bytes": 10**6, "buckets": ["styles"], **options},
    )


def opened(loras: Loras, path: str, **options: Any) -> LoraFile:
    spec = LoraSpec(path=parse(path), sha256=options.pop("sha256", None))
    with loras.open(spec, **options) as file:
        assert sha256(file.path.read_bytes()) == file.sha256
        return file


def failure(loras: Loras, path: str, **options: Any) -> FailureCode:
    with pytest.raises(JobFailure) as failed:
        opened(loras, path, **options)
    assert SECRET not in failed.value.message
    assert failed.value.message.endswith(".")
    retried = {FailureCode.LORA_UNREACHABLE, FailureCode.LORA_STORE_ERROR}
    assert failed.value.retry == (failed.value.code in retried)
    return failed.value.code


def kept(folder: Path) -> set[str]:
    """Return the names of all files in the store, partial downloads included."""
    return {path.stem for name in ("files", "incoming") for path in (folder / "cache" / name).glob("*")}


def test_an_unchanged_file_is_downloaded_once_and_a_changed_one_anew(
    site: Site, loras: Loras, tmp_path: Path
) -> None:
    url = site.file("/a", lora(1))
    first = opened(loras, f"{url}?sig={SECRET}")
    assert (first.sha256, first.bytes) == (sha256(lora(1)), len(lora(1)))
    assert opened(loras, f"{url}?sig={SECRET}") == first
    assert "If-None-Match" in site.requests[-1][2]
    site.file("/a", lora(2))
    assert opened(loras, f"{url}?sig={SECRET}").sha256 == sha256(lora(2))
    disk, origin = loras._store.meter, loras._origin
    assert (disk.hits, disk.misses) == (1, 2)
    assert origin.read_bytes == len(lora(1)) + len(lora(2)) and origin.read_seconds > 0
    # Another query may name another file, so the stored version does not apply.
    opened(loras, f"{url}?sig=other")
    assert "If-None-Match" not in site.requests[-1][2]
    assert kept(tmp_path) == {sha256(lora(1)), sha256(lora(2))}
    for file in (tmp_path / "cache").rglob("*"):
        assert SECRET not in str(file) and (file.is_dir() or SECRET.encode() not in file.read_bytes())


def test_a_file_that_is_gone_from_the_store_is_fetched_again(
    site: Site, loras: Loras, tmp_path: Path
) -> None:
    """It was deleted by hand, or lost in a power failure before it reached the disk."""
    url = site.file("/a", lora(1))
    opened(loras, url).path.unlink()
    assert opened(loras, url).bytes == len(lora(1))
    assert "If-None-Match" not in site.requests[-1][2]
    assert opened(loras, url).bytes == len(lora(1))
    assert "If-None-Match" in site.requests[-1][2]


def test_a_url_that_is_presigned_anew_is_the_same_file(site: Site, loras: Loras) -> None:
    url = site.file("/a", lora(1))
    signed = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=60&versionId=3&X-Amz-Signature="
    first = opened(loras, f"{url}?{signed}{SECRET}")
    assert opened(loras, f"{url}?{signed}other") == first
    assert site.requests[-1][1].endswith("Signature=other"), "the origin checks this URL's own signature"
    assert "If-None-Match" in site.requests[-1][2]
    opened(loras, f"{url}?{signed.replace('=3', '=4')}other")
    assert "If-None-Match" not in site.requests[-1][2]
    assert loras._origin.read_bytes == 2 * len(lora(1))


def test_without_an_etag_a_file_is_fetched_each_time(site: Site, loras: Loras) -> None:
    site.pages["/a"] = lambda request: answer(request, 200, lora(site.count("/a")))
    assert [opened(loras, site.url("/a")).sha256 for _ in "ab"] == [sha256(lora(1)), sha256(lora(2))]


def test_a_known_hash_needs_no_network(site: Site, loras: Loras, tmp_path: Path) -> None:
    url = site.file("/a", lora())
    assert opened(loras, url, sha256=sha256(lora())) == opened(loras, url)
    before = len(site.requests)
    assert opened(loras, "https://gone.example/b", sha256=sha256(lora())).bytes == len(lora())
    assert len(site.requests) == before
    assert failure(loras, url, sha256="0" * 64) is FailureCode.LORA_HASH_MISMATCH
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "a.safetensors").write_bytes(lora())
    opened(loras, "a.safetensors", sha256=sha256(lora()))
    assert failure(loras, "a.safetensors", sha256="0" * 64) is FailureCode.LORA_HASH_MISMATCH


BAD_FILES = {
    "a page": (b" \n<!DOCTYPE html><html>Sign in</html>", FailureCode.LORA_URL_IS_HTML),
    "another page": (b"<HTML>Sign in</html>", FailureCode.LORA_URL_IS_HTML),
    "nothing": (b"", FailureCode.LORA_FORMAT_NOT_SUPPORTED),
    "a pickle": (b"\x80\x02}q\x00.", FailureCode.LORA_FORMAT_NOT_SUPPORTED),
    "a zip": (b"PK\x03\x04" + b"x" * 100, FailureCode.LORA_FORMAT_NOT_SUPPORTED),
    "half a file": (lora()[:-10], FailureCode.LORA_FORMAT_NOT_SUPPORTED),
    "a huge header": ((2**63).to_bytes(8, "little") + b"{}", FailureCode.LORA_FORMAT_NOT_SUPPORTED),
    "a huge rank": (lora(rank=4096, size=1), FailureCode.LORA_FORMAT_NOT_SUPPORTED),
    "a model": (save({"a.weight": np.ones(1, np.float32)}), FailureCode.LORA_FORMAT_NOT_SUPPORTED),
    "too many bytes": (b"x" * 1_000_001, FailureCode.LORA_TOO_LARGE),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_lora_never_enters_the_store(site: Site, loras: Loras, tmp_path: Path, name: str) -> None:
    data, code = BAD_FILES[name]
    assert failure(loras, f"{site.file('/a', data)}?sig={SECRET}") is code
    assert kept(tmp_path) == set()


def test_a_header_of_60_bytes_is_no_page(site: Site, loras: Loras) -> None:
    """A header of that length makes the first byte of the file a `<`, like an HTML page."""
    text = b'{"a.lora_A.weight":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    data = (0x3C).to_bytes(8, "little") + text
    site.file("/a", data)
    assert failure(loras, site.url("/a")) is FailureCode.LORA_FORMAT_NOT_SUPPORTED


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, FailureCode.LORA_NOT_FOUND),
        (403, FailureCode.LORA_ACCESS_DENIED),
        (503, FailureCode.LORA_UNREACHABLE),
    ],
)
def test_what_the_server_refuses(site: Site, loras: Loras, status: int, code: FailureCode) -> None:
    site.pages["/a"] = lambda request: answer(request, status)
    assert failure(loras, f"{site.url('/a')}?sig={SECRET}") is code


def test_where_no_fetch_may_go(site: Site, loras: Loras) -> None:
    site.pages["/a"] = redirect(f"http://169.254.169.254/?sig={SECRET}")
    denied = [site.url("/a"), "http://127.0.0.2/", "s3://other/a.safetensors"]
    assert {failure(loras, path) for path in denied} == {FailureCode.URL_NOT_ALLOWED}
    assert failure(loras, "../../etc/passwd") is FailureCode.LORA_PATH_NOT_ALLOWED


def test_a_cut_download_and_a_full_disk_leave_nothing(site: Site, loras: Loras, tmp_path: Path) -> None:
    site.pages["/cut"] = lambda request: answer(request, 200, b"x" * 10, Content_Length="1000")
    assert failure(loras, site.url("/cut")) is FailureCode.LORA_UNREACHABLE
    url = site.file("/a", lora(size=20_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        assert failure(loras, url) is FailureCode.LORA_STORE_ERROR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept(tmp_path) == set()
    assert opened(loras, url).bytes > 65_536


def test_a_disk_that_is_full_before_the_budget_gives_up_what_is_unused(
    site: Site, loras: Loras, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unused, used = (opened(loras, site.file(f"/{seed}", lora(seed))) for seed in (1, 2))
    fetch = loras._fetcher.fetch

    def into_little_room(url: Url, into: BinaryIO, **options: Any) -> Fetched | None:
        if unused.path.exists():
            into.write(b"as far as it goes")
            raise OSError(errno.ENOSPC, "No space left on device")
        return fetch(url, into, **options)

    monkeypatch.setattr(loras._fetcher, "fetch", into_little_room)
    with loras.open(LoraSpec(path=parse(site.url("/2")), sha256=used.sha256)):
        third = opened(loras, site.file("/3", lora(3)))
    assert kept(tmp_path) == {used.sha256, third.sha256}


def test_the_store_s_folder_may_be_impossible(site: Site, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    loras = open_loras(site, tmp_path)
    assert failure(loras, site.file("/a", lora())) is FailureCode.LORA_STORE_ERROR


_PROCESS = """
import sys
from pathlib import Path
from deployments.spec.lora_reference import parse
from deployments.spec.job import LoraSpec
from tests.deployments.loras.sources.test_loras import open_loras
from tests.support.web import Site
loras = open_loras(Site(sys.argv[2]), Path(sys.argv[1]))
with loras.open(LoraSpec(path=parse(sys.argv[3]))) as file:
    print(file.sha256)
"""


def test_of_several_processes_one_downloads(site: Site, tmp_path: Path) -> None:
    bodies = 0

    def slow(request: BaseHTTPRequestHandler) -> None:
        nonlocal bodies
        if request.headers.get("If-None-Match") == '"1"':
            return answer(request, 304)
        bodies += 1
        time.sleep(0.5)
        return answer(request, 200, lora(), ETag='"1"')

    site.pages["/a"] = slow
    arguments = [sys.executable, "-c", textwrap.dedent(_PROCESS), str(tmp_path), site.host, site.url("/a")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    children = [subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [child.communicate(timeout=60)[0].strip() for child in children]
    assert outputs == [sha256(lora())] * 4
    assert bodies == 1 and site.count("/a") == 4


class Hub:
    """The hub's replies for one file: a large one is on the CDN and has its sha256 as ETag."""

    def __init__(self, site: Site, cdn: Site, data: bytes, large: bool = True) -> None:
        self.site, self.cdn, self.data, self.large = site, cdn, data, large
        self.commit = "c1"
        self.token: str | None = None
        for revision in ("main", "c1", "c2", "refs%2Fpr%2F1"):
            site.pages[f"/org/repo/resolve/{revision}/a%20b.safetensors"] = self.page
        cdn.pages["/file"] = lambda request: answer(request, 200, self.data, ETag='"cdn"')

    def page(self, request: BaseHTTPRequestHandler) -> None:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            answer(request, 401, X_Error_Code="GatedRepo")
        elif self.large:
            linked = f'"{sha256(self.data)}"'
            location = self.cdn.url("/file")
            answer(request, 302, X_Repo_Commit=self.commit, X_Linked_Etag=linked, Location=location)
        else:
            etag = f'"{hashlib.sha1(self.data).hexdigest()}"'
            answer(request, 200, self.data, X_Repo_Commit=self.commit, ETag=etag)


@pytest.fixture
def cdn() -> Iterator[Site]:
    with serving_site() as running:
        yield running


@pytest.fixture(params=[True, False], ids=["large", "small"])
def hub(request: pytest.FixtureRequest, site: Site, cdn: Site, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return Hub(site, cdn, lora(1), large=request.param)


def test_files_of_the_hub_are_fetched_by_their_version(hub: Hub, loras: Loras) -> None:
    reference = "hf://org/repo/a b.safetensors@main"
    link = "https://huggingface.co/org/repo/blob/main/a%20b.safetensors"

    def gets() -> int:
        return sum(method == "GET" for method, _, _ in hub.site.requests)

    first = opened(loras, reference)
    assert first.sha256 == sha256(lora(1))
    downloaded = gets()
    assert opened(loras, link) == first
    assert gets() == downloaded, "fetched again"
    assert hub.site.count("/org/repo/resolve/c1/a%20b.safetensors") >= 1, "it was not fetched by its commit"
    hub.data, hub.commit = lora(2), "c2"
    assert opened(loras, reference).sha256 == sha256(lora(2))
    opened(loras, "hf://org/repo/a b.safetensors@refs/pr/1")
    assert failure(loras, "hf://org/repo/c.safetensors@main") is FailureCode.LORA_NOT_FOUND


def test_gated_files_need_a_token_each_time(
    hub: Hub, loras: Loras, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, hub.token = "hf://org/repo/a b.safetensors", SECRET
    assert failure(loras, reference) is FailureCode.LORA_ACCESS_DENIED
    opened(loras, reference, token=SECRET)
    assert failure(loras, reference) is FailureCode.LORA_ACCESS_DENIED
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert failure(loras, reference) is FailureCode.LORA_ACCESS_DENIED, (
        "clients cannot use the server's token"
    )
    lending = open_loras(hub.site, tmp_path, server_token=True)
    opened(lending, reference)
    assert failure(lending, reference, token="wrong") is FailureCode.LORA_ACCESS_DENIED
    assert all("Authorization" not in headers for _, _, headers in hub.cdn.requests)
    assert len(hub.cdn.requests) == hub.large


def test_a_hash_of_the_hub_is_believed_before_and_checked_after(site: Site, cdn: Site, loras: Loras) -> None:
    Hub(site, cdn, lora(1))
    reference = "hf://org/repo/a b.safetensors"
    assert failure(loras, reference, sha256="0" * 64) is FailureCode.LORA_HASH_MISMATCH
    assert cdn.requests == []
    cdn.pages["/file"] = lambda request: answer(request, 200, lora(9))
    assert failure(loras, reference) is FailureCode.LORA_UNREACHABLE
    # A file that is already here under another name is not downloaded.
    opened(loras, site.file("/elsewhere", lora(1)))
    assert opened(loras, reference).sha256 == sha256(lora(1))
    assert len(cdn.requests) == 1


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real S3 server; the folder is the bucket `styles`."""
    folder = tmp_path / "s3" / "styles"
    folder.mkdir(parents=True)
    port, key = free_port(), "testtesttesttest"
    command = ["serve", "s3", "--auth-key", f"{key},{key}", "--addr", f"127.0.0.1:{port}", str(folder.parent)]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = subprocess.Popen([Path(sys.executable).with_name("rclone"), *command], stderr=subprocess.DEVNULL)
    client: Any = boto3.Session().client("s3")
    for _ in range(100):
        try:
            client.list_buckets()
            break
        except Exception:
            time.sleep(0.1)
    yield folder
    server.terminate()
    server.wait()


def test_objects_in_s3(bucket: Path, loras: Loras, site: Site, tmp_path: Path) -> None:
    (bucket / "a.safetensors").write_bytes(lora(1))
    (bucket / "page.safetensors").write_bytes(b"<html>")
    ticks: list[int] = []
    first = opened(loras, "s3://styles/a.safetensors", tick=lambda: ticks.append(1))
    assert first.sha256 == sha256(lora(1)) and ticks
    inode = first.path.stat().st_ino
    assert opened(loras, "s3://styles/a.safetensors").path.stat().st_ino == inode
    (bucket / "a.safetensors").write_bytes(lora(2))
    assert opened(loras, "s3://styles/a.safetensors").sha256 == sha256(lora(2))
    assert failure(loras, "s3://styles/missing.safetensors") is FailureCode.LORA_NOT_FOUND
    assert failure(loras, "s3://styles/page.safetensors") is FailureCode.LORA_URL_IS_HTML
    small = open_loras(site, tmp_path / "small", max_bytes=10)
    assert failure(small, "s3://styles/a.safetensors") is FailureCode.LORA_TOO_LARGE


def test_s3_that_is_away(loras: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testtesttesttest")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert failure(loras, "s3://styles/a.safetensors") is FailureCode.LORA_UNREACHABLE
