"""Parsing of references to remote LoRAs."""

from __future__ import annotations

import pytest

from deployments.spec.lora_reference import (
    BucketFile,
    HubFile,
    LoraNotSafetensors,
    LoraUrlIsDirectory,
    RootFile,
    UrlNotAllowed,
    WebFile,
    check,
    parse,
)


@pytest.mark.parametrize("path", ["a.safetensors", "hf/a.safetensors", "a:b", "http:/a", "://a", "c:\\a", ""])
def test_paths(path: str) -> None:
    assert parse(path) == RootFile(path)


HUB = HubFile("org/repo", "a/b c.safetensors", "main")


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/repo/a/b c.safetensors",
        "HF://org/repo/a/b c.safetensors@main",
        "https://huggingface.co/org/repo/blob/main/a/b%20c.safetensors",
        "https://huggingface.co/org/repo/resolve/main/a/b%20c.safetensors?download=true",
        "https://www.huggingface.co/org/repo/raw/main/a/b%20c.safetensors",
        "http://hf.co/org/repo/resolve/main/a/b%20c.safetensors",
    ],
)
def test_files_on_the_hub(text: str) -> None:
    assert parse(text) == HUB
    assert parse(HUB.text) == HUB


def test_other_references() -> None:
    assert parse("s3://bucket/a/b.safetensors") == BucketFile("bucket", "a/b.safetensors")
    file = parse("https://civitai.com/api/download/models/1?type=Model#x")
    assert isinstance(file, WebFile)
    assert file.text == "https://civitai.com/api/download/models/1?type=Model"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("https://huggingface.co/org/repo/tree/main", LoraUrlIsDirectory),
        ("https://huggingface.co/org/repo/tree/main/loras", LoraUrlIsDirectory),
        ("https://huggingface.co/datasets/org/repo/tree/main/loras", LoraUrlIsDirectory),
        ("https://huggingface.co/org/repo/blob/main/", LoraUrlIsDirectory),
        ("https://huggingface.co/org/repo", LoraUrlIsDirectory),
        ("https://huggingface.co/", LoraUrlIsDirectory),
        ("https://huggingface.co/org/repo/blob/main/a.bin", LoraNotSafetensors),
        ("hf://org/repo/README.md", LoraNotSafetensors),
        ("s3://bucket/a.ckpt", LoraNotSafetensors),
        ("https://host.example/a.pt?x=.safetensors", LoraNotSafetensors),
        ("hf://org/a.safetensors", UrlNotAllowed),
        ("hf://org/repo/../../a.safetensors", UrlNotAllowed),
        ("hf://org/repo/a.safetensors@../x", UrlNotAllowed),
        ("hf://org/repo/a.safetensors@", UrlNotAllowed),
        ("https://huggingface.co/org/repo/resolve/%2e%2e/a.safetensors", UrlNotAllowed),
        ("s3://Bucket/a.safetensors", UrlNotAllowed),
        ("s3://bucket", UrlNotAllowed),
        ("s3://", UrlNotAllowed),
        ("file:///etc/passwd", UrlNotAllowed),
        ("ftp://host.example/a.safetensors", UrlNotAllowed),
        ("gopher://host.example/", UrlNotAllowed),
    ],
)
def test_what_is_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse(text)


def test_what_has_to_be_listed() -> None:
    bucket, web = parse("s3://bucket/a.safetensors"), parse("http://127.0.0.1/a")
    assert bucket is not None and web is not None
    check(bucket, (), ("bucket",))
    check(web, ("127.0.0.1",), ())
    for file in (bucket, web):
        with pytest.raises(UrlNotAllowed):
            check(file, (), ("buckets",))
    check(HUB, (), ())
