"""Log records: no secrets, and no forged lines."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from cluster.telemetry import MAX_CHARS, JsonLines, redact

SECRET = "Zk3JxQ9mVt7Lw2Rb5Yc8"


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://bucket.s3.amazonaws.com/a.png?X-Amz-Signature={SECRET}&X-Amz-Date=1 failed",
        f"https://host/lora.safetensors?token={SECRET}",
        f"https://host/a#access={SECRET}",
        f"('https://user:{SECRET}@host/a')",
        f"https://user:p@{SECRET}@host/a",
        f"postgresql+psycopg://jobs:{SECRET}@db:5432/jobs",
        f"redis://:{SECRET}@cache",
        f"Authorization: Bearer {SECRET}",
        f"{{'authorization': 'bearer {SECRET}'}}",
        f"Authorization: Basic {SECRET}==",
        f"invalid token hf_{SECRET}",
        f"HF_TOKEN={SECRET}",
        f'{{"hf_token": "{SECRET}"}}',
        f"aws_secret_access_key = {SECRET}/+abc",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"aws_session_token: {SECRET}",
        f"password={SECRET}",
        f"SECRET_KEY={SECRET}",
        f"x-api-key: {SECRET}",
        f"API_KEYS={SECRET}",
    ],
)
def test_secrets_are_hidden(text: str) -> None:
    assert SECRET not in redact(text)
    assert "***" in redact(text)


def test_aws_key_ids_are_hidden() -> None:
    assert redact("key AKIAIOSFODNN7EXAMPLE is unknown") == "key AKIA*** is unknown"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "HTTP 404 for https://huggingface.co/org/repo/resolve/main/a.safetensors",
        "the tokenizer was not found; 77 tokens at most",
        "a basic bearer of the ring",
        "hf_transfer and hf_hub_download",
        "/var/loras/style?.safetensors: what is this?",
        "ümlaut 漢字 😀",
        "sha256 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
    ],
)
def test_plain_text_stays(text: str) -> None:
    assert redact(text) == text


def test_the_way_to_a_url_stays() -> None:
    assert (
        redact("s3://bucket/key?versionId=1 and (https://h/p?q)")
        == "s3://bucket/key?*** and (https://h/p?***"
    )


@pytest.mark.parametrize(
    "char", ["\n", "\r", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\u202e", "\u200b", "\ud800"]
)
def test_a_text_is_one_printable_line(char: str) -> None:
    redacted = redact(f"ok{char}INFO forged")
    assert redacted.isprintable()
    assert len(redacted.splitlines()) == 1
    assert "forged" in redacted
    redacted.encode()


def test_a_text_has_an_end() -> None:
    assert len(redact("x" * 10**6)) == MAX_CHARS
    assert redact("x" * 10**6).endswith("…")
    assert redact("x" * MAX_CHARS) == "x" * MAX_CHARS
    for length in range(MAX_CHARS - 20, 4 * MAX_CHARS):
        assert SECRET[:6] not in redact("password=" + "x" * length + f" https://u:{SECRET}@h/")


def test_hostile_text_takes_no_time() -> None:
    for text in (
        "://" * 50_000,
        "a@" * 50_000,
        "token" * 50_000,
        "https://" + "a@" * 50_000,
        "a-" * 50_000,
        " " * 50_000,
    ):
        assert len(redact(text)) <= MAX_CHARS


def test_a_record_is_one_json_line() -> None:
    try:
        raise ValueError(f"bad\npassword={SECRET}")
    except ValueError:
        record = logging.makeLogRecord(
            {
                "name": "cluster",
                "levelname": "ERROR",
                "msg": "job %s\nfailed: %s",
                "args": ("j1", f"Bearer {SECRET}"),
                "exc_info": sys.exc_info(),
                "job": f"https://h/?{SECRET}",
            }
        )
    text = JsonLines().format(record)
    assert "\n" not in text
    assert SECRET not in text
    line = json.loads(text)
    assert (line["level"], line["logger"]) == ("ERROR", "cluster")
    assert line["message"] == "job j1\\nfailed: Bearer ***"
    assert line["job"] == "https://h/?***"
    assert line["traceback"][0] == "Traceback (most recent call last):"
    assert line["traceback"][-1] == "password=***"
    assert line["at"].endswith("+00:00")


def test_a_process_logs_json_on_standard_error() -> None:
    code = (
        "import logging; from cluster.telemetry import configure_logging; configure_logging('WARNING'); "
        "logging.getLogger('x').info('unseen'); logging.getLogger('x').warning('seen', extra={'job': 'j1'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    (line,) = [json.loads(text) for text in done.stderr.splitlines()]
    assert (line["message"], line["job"]) == ("seen", "j1")
