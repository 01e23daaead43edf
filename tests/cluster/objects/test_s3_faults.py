"""Faults between an S3 store and its server: which ones are survived, and the text of the errors."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from cluster.objects import s3
from cluster.objects.s3 import PART_BYTES, S3Store
from cluster.objects.store import StoreError
from tests.support.s3 import (
    ACCESS_KEY,
    SECRET,
    Fault,
    Proxy,
    S3Server,
    broken,
    cut_after_receiving,
    delayed,
    name_in_bucket,
    refused,
    reset_after_sending,
    silent,
)
from tests.support.service import free_port

KEY = "0d4c/1/0-Zm9v_-.png"


@pytest.mark.parametrize(
    "faults",
    [
        [delayed(0.5)],
        [refused],
        [refused, refused],
        [reset_after_sending(100)],
        [reset_after_sending(1_000_000)],
        [refused, reset_after_sending(0), delayed(0.2)],
    ],
    ids=["late", "503", "503 twice", "reset at once", "reset in the middle", "one after the other"],
)
def test_an_upload_survives_faults(s3_proxy: Proxy, s3_url: str, faults: list[Fault]) -> None:
    store, data = S3Store(s3_url), os.urandom(3_000_000)
    s3_proxy.faults.extend(faults)
    store.put(KEY, data, "image/png")
    assert store.get(KEY) == data
    assert not s3_proxy.faults


def test_a_part_that_fails_is_sent_again(
    s3_proxy: Proxy, s3_url: str, s3_server: S3Server, tmp_path: Path
) -> None:
    data = os.urandom(2 * PART_BYTES + 1000)
    (tmp_path / "video.mp4").write_bytes(data)
    store = S3Store(s3_url)
    s3_proxy.faults.extend([reset_after_sending(PART_BYTES // 2), reset_after_sending(PART_BYTES // 2)])
    store.put_file("video.mp4", tmp_path / "video.mp4", "video/mp4")
    assert store.get("video.mp4") == data
    assert not s3_proxy.faults
    assert s3_server.parts(name_in_bucket(s3_url, "video.mp4")) > 3


@pytest.mark.parametrize(
    "fault",
    [refused, broken, delayed(0.5), cut_after_receiving(500_000)],
    ids=["503", "500", "late", "cut off"],
)
def test_a_download_survives_faults(s3_proxy: Proxy, s3_url: str, fault: Fault) -> None:
    data = os.urandom(3_000_000)
    S3Store(s3_url).put(KEY, data, "image/png")
    store = S3Store(s3_url)
    s3_proxy.faults.append(fault)
    assert store.get(KEY) == data
    assert not s3_proxy.faults


def use_everything(store: S3Store, reason: str, tmp_path: Path) -> list[str]:
    """Assert that every method that sends a request fails with `reason`; return the error messages."""
    (tmp_path / "file").write_bytes(b"x")
    messages = []
    for use in (
        lambda: store.put(KEY, b"", "image/png"),
        lambda: store.put_file(KEY, tmp_path / "file", "image/png"),
        lambda: store.get(KEY),
        lambda: store.exists(KEY),
        lambda: store.delete("0d4c"),
    ):
        with pytest.raises(StoreError, match=reason) as refusal:
            use()
        messages.append(str(refusal.value))
    return messages


def test_a_wrong_key(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = "wrong-secret-key-of-some-length"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong)
    messages = use_everything(S3Store(s3_url), "was refused with (SignatureDoesNotMatch|403)", tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-access-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-session-token-of-some-length")
    messages += use_everything(S3Store(s3_url), "was refused with (InvalidAccessKeyId|403)", tmp_path)
    for secret in (wrong, SECRET, ACCESS_KEY, "another-access-key", "a-session-token"):
        assert secret not in "".join(messages)


def test_a_server_that_is_away(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    messages = use_everything(S3Store(s3_url), "Could not connect to the endpoint URL", tmp_path)
    assert "uploads" not in "".join(messages), "errors leave out the query"


def test_a_server_that_never_answers(s3_proxy: Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    monkeypatch.setattr(s3, "READ_S", 0.5)
    store = S3Store(s3_url)
    s3_proxy.faults.extend([silent] * 2)
    with pytest.raises(StoreError, match="timeout"):
        store.exists(KEY)
    assert not s3_proxy.faults
    assert not store.exists(KEY), "the store works again"


def test_a_server_that_stays_overloaded(
    s3_proxy: Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    store = S3Store(s3_url)
    s3_proxy.faults.extend([refused] * 2)
    with pytest.raises(StoreError, match="PutObject was refused with SlowDown"):
        store.put(KEY, b"x", "image/png")
    assert not store.exists(KEY)


def test_a_bucket_that_is_not_there(s3_url: str) -> None:
    store = S3Store("s3://nowhere/prefix")
    with pytest.raises(StoreError, match="PutObject was refused with NoSuchBucket"):
        store.put(KEY, b"", "image/png")
    with pytest.raises(StoreError, match="NoSuchBucket"):
        store.delete("0d4c")
    with pytest.raises(StoreError, match="cannot be read: GetObject was refused with NoSuchBucket"):
        store.get(KEY)


def test_no_keys_at_all(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = S3Store(s3_url)
    with pytest.raises(StoreError, match="Unable to locate credentials"):
        store.put(KEY, b"", "image/png")
    with pytest.raises(StoreError, match="no URL can be signed"):
        store.url(KEY, "http://gateway")


def test_a_profile_that_is_not_there(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"cannot be set up: .*nobody"):
        S3Store(s3_url)


def test_logs_hold_no_secret(s3_proxy: Proxy, s3_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = S3Store(s3_url)
    s3_proxy.faults.append(refused)
    store.put(KEY, b"x", "image/png")
    store.url(KEY, "http://gateway")
    with pytest.raises(StoreError):
        store.get("nothing")
    assert "Signature" not in caplog.text
    assert SECRET not in caplog.text
