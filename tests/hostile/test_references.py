"""Inputs 4 to 9 and 34 to 41: LoRA paths and URLs refused by their text; the URLs also as control images."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import LORA, SECRET, Stage, request

OUTSIDE = {
    "4 above": "../outside.safetensors",
    "4 far above": "../../../../etc/passwd",
    "4 above from within": "a/../../outside.safetensors",
    "5 absolute": "/etc/passwd",
    "5 the root of all": "/",
    "6 a link": "link_out.safetensors",
    "6 a link to a folder": "link_folder/outside.safetensors",
    "7 encoded": "%2e%2e%2foutside.safetensors",
    "7 half encoded": "..%2foutside.safetensors",
    "7 encoded twice": "%252e%252e%252foutside.safetensors",
    "7 backslash": "..\\outside.safetensors",
    "37 backslashes for slashes": "http:\\\\good@evil/a.safetensors",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_leave_the_root(stage: Stage, name: str) -> None:
    """The reply must not show if the file exists."""
    root = stage.service.settings.loras
    outside = root.parent / "outside.safetensors"
    link, folder = root / "link_out.safetensors", root / "link_folder"
    if not link.is_symlink():
        link.symlink_to(outside)
        folder.symlink_to(root.parent)
    answers = []
    for there in (False, True):
        outside.unlink(missing_ok=True)
        if there:
            outside.write_bytes(LORA.read_bytes())
        assert stage.refused(request(OUTSIDE[name])) == (400, "LORA_PATH_NOT_ALLOWED")
        answers.append(stage.service.post(request(OUTSIDE[name])).text)
    assert answers[0] == answers[1]


def test_7_nul(stage: Stage) -> None:
    assert stage.refused(request("style.safetensors\0.png")) == (422, "text_nul")


PLACES: dict[str, tuple[str, str]] = {
    "1 .pt": ("https://files.example/a.pt", "LORA_FORMAT_NOT_SUPPORTED"),
    "1 .CKPT": ("https://files.example/a.CKPT", "LORA_FORMAT_NOT_SUPPORTED"),
    "1 .bin of the hub": ("https://huggingface.co/org/repo/blob/main/a.bin", "LORA_FORMAT_NOT_SUPPORTED"),
    "3 .tar.gz": ("https://files.example/a.tar.gz", "LORA_FORMAT_NOT_SUPPORTED"),
    "3 .zip of the hub": ("hf://org/repo/a.zip@main", "LORA_FORMAT_NOT_SUPPORTED"),
    "4 above a repository": ("hf://org/../etc/passwd", "URL_NOT_ALLOWED"),
    "8 no repository": ("hf://a.safetensors", "URL_NOT_ALLOWED"),
    "8 a bucket that is not listed": ("s3://other-bucket/a.safetensors", "URL_NOT_ALLOWED"),
    "9 a folder of the hub": ("https://huggingface.co/org/repo/tree/main", "LORA_URL_IS_DIRECTORY"),
    "9 a repository": ("https://huggingface.co/org/repo", "LORA_URL_IS_DIRECTORY"),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_that_hold_no_lora(stage: Stage, name: str) -> None:
    path, code = PLACES[name]
    assert stage.refused(request(path)) == (400, code)


URLS = {
    "8 file": "file:///etc/passwd",
    "8 ftp": "ftp://host.example/a.safetensors",
    "8 gopher": "gopher://host.example",
    "8 nothing": "http://",
    "8 too long": "http://" + "a" * 4000 + ".com/",
    "34 loopback": "http://127.0.0.1/a",
    "34 IPv6 loopback": "http://[::1]/",
    "34 zero": "http://0/",
    "34 one number": "http://2130706433/",
    "34 hexadecimal": "http://0x7f.1/",
    "34 octal": "http://0177.0.0.1/",
    "34 full width digits": "http://\uff11\uff12\uff17.0.0.1/",
    "34 private": "http://10.0.0.1/",
    "34 metadata": "http://169.254.169.254/latest/meta-data/",
    "35 mapped metadata": "http://[::ffff:169.254.169.254]/latest/meta-data/",
    "35 NAT64 metadata": "http://[64:ff9b::a9fe:a9fe]/",
    "37 backslash before the host": "http://good\\@evil/a.safetensors",
    "38 user and password": f"https://me:{SECRET}password@host.example/a.safetensors",
    "38 user": "https://me@host.example/a.safetensors",
    "38 trailing dot": "http://example.com./a.safetensors",
    "38 homograph": "http://ex\u0430mple.com/a.safetensors",
    "39 localhost": "http://localhost/a",
    "39 a service of the cluster": "http://kubernetes.default.svc/",
    "39 a name without dot": "http://raycluster-head/",
    "39 Ray's dashboard": "http://127.0.0.1:8265/api/jobs/",
    "39 GCS of a public host": "http://example.com:6379/a.safetensors",
    "39 Ray client of a public host": "http://example.com:10001/a.safetensors",
}


@pytest.mark.parametrize("name", URLS)
def test_urls_that_are_never_fetched(stage: Stage, name: str) -> None:
    url = URLS[name]
    assert stage.refused(request(url)) == (400, "URL_NOT_ALLOWED")
    answer = stage.service.post(request(url)).json()["detail"]["error"]["details"]
    assert answer["lora_path"] == url.split("://")[0] + "://***"
    assert answer["reason"].endswith(".")
    assert stage.refused(request(prompt={"ctrl_img": url})) == (400, "URL_NOT_ALLOWED")
