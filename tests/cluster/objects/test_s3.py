"""Objects in a bucket of a real S3 server: how they are stored, and how clients get them."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import httpx
import pytest

from cluster.objects.s3 import PART_BYTES, S3Store, S3Url
from tests.support.s3 import BUCKET, S3Server, name_in_bucket

KEY = "0d4c/1/0-Zm9v_-.png"


@pytest.fixture
def store(s3_url: str) -> S3Store:
    return S3Store(s3_url)


def head(s3_url: str, key: str) -> dict[str, Any]:
    """The server's metadata of an object."""
    return boto3.client("s3").head_object(Bucket=BUCKET, Key=name_in_bucket(s3_url, key))


def test_where_an_object_is(store: S3Store, s3_url: str) -> None:
    store.put(KEY, b"picture", "image/png")
    assert store.location(KEY) == f"{s3_url}/{KEY}"
    assert store.local_path(KEY) is None, "the gateway does not serve objects in a bucket"
    assert head(s3_url, KEY)["ContentType"] == "image/png"
    assert not S3Store(f"{s3_url}/below/").exists(KEY)
    assert S3Store(f"s3://{BUCKET}").exists(name_in_bucket(s3_url, KEY))


def test_objects_are_kept_as_the_url_says(s3_url: str) -> None:
    store = S3Store(f"{s3_url}?sse=aws:kms&kms_key_id=alias/pictures&storage_class=STANDARD_IA")
    store.put(KEY, b"picture", "image/png")
    store.put("large.png", bytes(PART_BYTES + 1), "image/png")
    for key in (KEY, "large.png"):
        known = head(s3_url, key)
        assert known["ContentType"] == "image/png"
        assert known["ServerSideEncryption"] == "aws:kms"
        assert known["SSEKMSKeyId"] == "alias/pictures"
        assert known["StorageClass"] == "STANDARD_IA"


def test_large_objects_travel_in_parts(
    store: S3Store, s3_server: S3Server, s3_url: str, tmp_path: Path
) -> None:
    data = os.urandom(2 * PART_BYTES + 1000)
    (tmp_path / "video.mp4").write_bytes(data)
    store.put("bytes.mp4", data, "video/mp4")
    store.put_file("file.mp4", tmp_path / "video.mp4", "video/mp4")
    for key in ("bytes.mp4", "file.mp4"):
        assert s3_server.parts(name_in_bucket(s3_url, key)) == 3
        assert store.get(key) == data
    store.put("small.mp4", data[:1000], "video/mp4")
    assert s3_server.parts(name_in_bucket(s3_url, "small.mp4")) == 0


def test_a_file_is_not_read_into_memory(store: S3Store, tmp_path: Path) -> None:
    with (tmp_path / "video.mp4").open("wb") as file:
        file.truncate(6 * PART_BYTES)
    tracemalloc.start()
    try:
        store.put_file("video.mp4", tmp_path / "video.mp4", "video/mp4")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * PART_BYTES


def test_a_url_gives_the_object_until_it_expires(s3_url: str) -> None:
    store = S3Store(f"{s3_url}?expires_s=2")
    store.put(KEY, b"picture", "image/png")
    url = store.url(KEY, "http://gateway")
    answer = httpx.get(url)
    assert (answer.content, answer.headers["content-type"]) == (b"picture", "image/png")
    time.sleep(3)
    expired = httpx.get(url)
    assert expired.is_client_error and b"picture" not in expired.content
    assert httpx.get(store.url(KEY, "http://gateway")).content == b"picture", "each read makes a new URL"


def test_a_url_gives_nothing_else(store: S3Store) -> None:
    store.put(KEY, b"picture", "image/png")
    store.put("secret.png", b"secret", "image/png")
    url = store.url(KEY, "http://gateway")
    assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["3600"]
    for tampered in (
        url.replace(KEY, "secret.png"),
        url.replace("X-Amz-Expires=3600", "X-Amz-Expires=9999"),
        url[:-1] + ("0" if url[-1] != "0" else "1"),
        url.partition("?")[0],
    ):
        assert tampered != url
        assert httpx.get(tampered).is_client_error
    assert httpx.put(url, content=b"forged").is_client_error
    assert store.get(KEY) == b"picture"


@pytest.mark.parametrize(
    ("place", "environment", "start"),
    [
        ("pictures", {"AWS_REGION": "eu-west-1"}, "https://pictures.s3.eu-west-1.amazonaws.com/a.png?"),
        (
            "pictures",
            {"AWS_DEFAULT_REGION": "eu-west-2"},
            "https://pictures.s3.eu-west-2.amazonaws.com/a.png?",
        ),
        ("my.pictures", {"AWS_REGION": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/my.pictures/a.png?"),
        (
            "pictures?addressing=path",
            {"AWS_REGION": "eu-west-1"},
            "https://s3.eu-west-1.amazonaws.com/pictures/",
        ),
        ("pictures", {"AWS_ENDPOINT_URL_S3": "http://minio:9000"}, "http://minio:9000/pictures/a.png?"),
        ("pictures", {"AWS_ENDPOINT_URL": "https://minio"}, "https://minio/pictures/a.png?"),
        (
            "pictures?addressing=virtual",
            {"AWS_ENDPOINT_URL_S3": "http://minio:9000"},
            "http://pictures.minio:9000/a.png?",
        ),
    ],
)
def test_urls_lead_to_the_host_that_they_are_signed_for(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, place: str, environment: dict[str, str], start: str
) -> None:
    """No request is sent: AWS is unreachable in tests."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    url = S3Store(f"s3://{place}").url("a.png", "http://gateway")
    assert url.startswith(start)
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"
    assert f"%2F{region}%2Fs3%2Faws4_request" in url


def test_a_deletion_takes_every_page(store: S3Store, s3_url: str) -> None:
    """One page of a listing, and one delete request, holds a thousand objects."""
    keys = [f"job/{index}.json" for index in range(1001)]
    client = boto3.client("s3")
    for key in keys:
        client.put_object(Bucket=BUCKET, Key=name_in_bucket(s3_url, key))
    first_page = client.list_objects_v2(Bucket=BUCKET, Prefix=name_in_bucket(s3_url, "job"))
    assert first_page["IsTruncated"]
    store.delete("job")
    assert "Contents" not in client.list_objects_v2(Bucket=BUCKET, Prefix=name_in_bucket(s3_url, "job"))


def test_threads_share_one_store(store: S3Store) -> None:
    """Threads of a gateway do this; one of them uploads in parts meanwhile."""
    bodies = {f"{index}.png": bytes([index]) * (PART_BYTES + 1 if index == 0 else 1000) for index in range(8)}
    faults: list[BaseException] = []

    def work(key: str, data: bytes) -> None:
        try:
            for _ in range(3):
                store.put(key, data, "image/png")
                assert store.get(key) == data
                assert httpx.get(store.url(key, "http://gateway")).content == data
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=item) for item in bodies.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_what_a_url_says() -> None:
    plain = S3Url.parse("s3://pictures")
    assert (plain.bucket, plain.prefix, plain.upload) == ("pictures", "", {})
    assert (plain.addressing, plain.expires_s) == (None, 3600)
    full = S3Url.parse(
        "s3://my.pictures/a/b/?sse=AES256&storage_class=GLACIER_IR&addressing=path&expires_s=604800"
    )
    assert (full.bucket, full.prefix) == ("my.pictures", "a/b/")
    assert full.upload == {"ServerSideEncryption": "AES256", "StorageClass": "GLACIER_IR"}
    assert (full.addressing, full.expires_s) == ("path", 604800)


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "/prefix",
        "b",
        "Bucket",
        "bucket:80/prefix",
        "key:hunter2@bucket/prefix",
        "bucket//prefix",
        "bucket/../prefix",
        "bucket/.hidden",
        "bucket/a b",
        "bucket/prefix#hunter2",
        "bucket?hunter2",
        "bucket?secret_access_key=hunter2",
        "bucket?sse=AES256&sse=AES256",
        "bucket?sse=",
        "bucket?sse=hunter2",
        "bucket?kms_key_id=alias/a",
        "bucket?sse=AES256&kms_key_id=alias/a",
        "bucket?sse=aws:kms&kms_key_id=hunter2 ?",
        "bucket?storage_class=GLACIER",
        "bucket?storage_class=DEEP_ARCHIVE",
        "bucket?storage_class=standard",
        "bucket?addressing=auto",
        "bucket?expires_s=0",
        "bucket?expires_s=604801",
        "bucket?expires_s=1h",
    ],
)
def test_other_urls_are_refused(rest: str) -> None:
    with pytest.raises(ValueError, match=r"S3 store|kms_key_id needs") as refusal:
        S3Url.parse(f"s3://{rest}")
    assert "hunter2" not in str(refusal.value)
