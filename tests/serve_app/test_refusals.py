"""Every refusal: its code, status and details, its place in the order, and that nothing was stored."""

from __future__ import annotations

import base64
import itertools
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.catalog import CATALOG
from tests.serve_app.conftest import Service, base64_png, body, kontext_body, png, serving

SECRET = "Sg7secret"

TWO_LORAS = [{"path": "style.safetensors"}, {"path": f"https://me:{SECRET}@host/b?sig={SECRET}"}]

OVERSIZED = base64.b64encode(png(8192, 4097)).decode()

GIF_HEADER_ONLY = base64.b64encode(b"GIF89a\xff\xff\xff\xff\x80\x00\x00").decode()


def _damaged_png() -> str:
    whole = png(64, 64)
    return base64.b64encode(whole[: len(whole) // 2]).decode()


MODEL_RULES: dict[str, dict[str, Any]] = {
    "MODEL_NOT_FOUND": {"model": "flux9"},
    "LORA_FILE_REQUIRED": {"loras": []},
    "MOE_FORMAT_NOT_SUPPORTED": {"loras": [{**lora, "transformer": "low"} for lora in TWO_LORAS]},
    "SINGLE_LORA_ONLY": {"loras": [{"path": "missing.safetensors"}, {"path": "style.safetensors"}]},
    "LORA_NOT_FOUND": {"loras": [{"path": "missing.safetensors"}]},
    "CONTROL_IMAGE_REQUIRED": {"model": "flux_kontext"},
}
"""What breaks each rule, in the order of the checks."""

OTHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("TOO_MANY_PROMPTS", body(prompts=[{"prompt": "a"}] * 101), {"prompts": 101, "most": 100}),
    ("PROMPT_TOO_LONG", body(prompt={"prompt": "a" * 10_001}), {"prompt_index": 0, "most": 10_000}),
    ("PROMPT_TOO_LONG", body(prompt={"neg": "a" * 10_001}), {"prompt_index": 0, "most": 10_000}),
    ("PROMPT_TOO_LONG", body(trigger_word="a" * 10_001), {"prompt_index": 0, "most": 10_000}),
    (
        "PROMPT_TOO_LONG",
        body(prompts=[{"prompt": "a"}, {"prompt": "[trigger]" * 1000}], trigger_word="eleven char"),
        {"prompt_index": 1, "most": 10_000},
    ),
    ("RESOLUTION_NOT_SUPPORTED", body(prompt={"resolution": "High"}), {"model": "flux", "prompt_index": 0}),
    ("SECRET_KEY_REQUIRED", body(hf_token=SECRET), {}),
    (
        "OUTPUT_FORMAT_NOT_SUPPORTED",
        body(output_format="mp4"),
        {"model": "flux", "supported": ["jpeg", "png", "webp"]},
    ),
    (
        "OUTPUT_FORMAT_NOT_SUPPORTED",
        body(model="wan21_1b", output_format="png"),
        {"model": "wan21_1b", "supported": ["webp", "mp4"]},
    ),
    (
        "TOO_MANY_CONTROL_IMAGES",
        kontext_body(ctrl_img_1=base64_png(), ctrl_img_3=base64_png()),
        {"model": "flux_kontext", "prompt_index": 0, "most": 1},
    ),
]

BAD_URLS = [
    "http://127.0.0.1:8265/",
    "http://[::1]/",
    "http://0/",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://[::ffff:169.254.169.254]/latest/meta-data/",
    "http://169.254.169.254/latest/meta-data/",
    "http://localhost:8265/",
    "http://kubernetes.default.svc/",
    "http://good\\@evil/a.safetensors",
    "http://exаmple.com/a.safetensors",  # noqa: RUF001 - a Cyrillic letter
    "http://example.com./a.safetensors",
    "http://example.com:6379/a.safetensors",
    "https://me:password@host.example/a.safetensors",
    "http://" + "a" * 4000 + ".com/",
    "file:///etc/passwd",
    "ftp://host.example/a.safetensors",
    "gopher://host.example",
    "s3://other-bucket/a.safetensors",
    "http://",
]

BAD_IMAGES = {
    "not base64": "@@@",
    "wrong length": "abc",
    "empty data uri": "data:image/png;base64,",
    "data uri that is not base64": "data:image/svg+xml,<svg/>",
    "text": base64.b64encode(b"just text").decode(),
    "html": base64.b64encode(b"<html>login</html>").decode(),
    "svg": base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg"/>').decode(),
    "eps": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode(),
    "truncated": _damaged_png(),
    "no pixels": GIF_HEADER_ONLY,
    "too many pixels": OVERSIZED,
    "garbage after good base64": base64_png() + "@",
    "not ascii": "ü" * 8,
}


def refused(service: Service, request: dict[str, Any]) -> tuple[str, dict[str, Any], int]:
    """Post a request that must be refused with an error of ours; check that it left nothing behind."""
    before = service.stored
    answer = service.post(request)
    assert service.stored == before
    assert SECRET not in answer.text
    error = answer.json()["detail"]["error"]
    assert set(answer.json()["detail"]) == {"error"}
    assert set(error) == {"code", "message", "details"}
    assert error["message"].endswith(".")
    return error["code"], error["details"], answer.status_code


@pytest.mark.parametrize("code", MODEL_RULES)
def test_each_rule_of_the_models(service: Service, code: str) -> None:
    found, details, status = refused(service, body(**MODEL_RULES[code]))
    assert (found, status) == (code, 400)
    match code:
        case "MODEL_NOT_FOUND":
            assert details == {"supported_models": list(CATALOG)}
        case "LORA_FILE_REQUIRED":
            assert details == {"loras": []}
        case "MOE_FORMAT_NOT_SUPPORTED":
            assert details["loras"][0] == {
                "path": "style.safetensors",
                "transformer": "low",
                "network_multiplier": None,
            }
            assert details["loras"][1]["path"] == "https://***"
        case "SINGLE_LORA_ONLY":
            assert [lora["path"] for lora in details["loras"]] == ["missing.safetensors", "style.safetensors"]
        case "LORA_NOT_FOUND":
            assert details["lora_path"] == "missing.safetensors"
        case "CONTROL_IMAGE_REQUIRED":
            assert details == {"model": "flux_kontext", "prompt_index": 0}


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(MODEL_RULES, 2)])
def test_of_two_broken_rules_the_first_answers(service: Service, first: str, second: str) -> None:
    request = body(**MODEL_RULES[second] | MODEL_RULES[first])
    assert refused(service, request)[0] == first


@pytest.mark.parametrize("first", MODEL_RULES)
@pytest.mark.parametrize("ours", range(len(OTHERS)), ids=[code for code, _, _ in OTHERS])
def test_the_rules_of_the_reference_come_before_our_bounds(service: Service, first: str, ours: int) -> None:
    request = OTHERS[ours][1] | MODEL_RULES[first]
    if first == "CONTROL_IMAGE_REQUIRED":
        request["prompts"] = [*request["prompts"], {"prompt": "no image"}]
    assert refused(service, request)[0] == first


@pytest.mark.parametrize(("code", "request_body", "details"), OTHERS, ids=[code for code, _, _ in OTHERS])
def test_our_bounds(
    service: Service, code: str, request_body: dict[str, Any], details: dict[str, Any]
) -> None:
    assert refused(service, request_body) == (code, details, 400)


@pytest.mark.parametrize("url", BAD_URLS)
def test_urls_that_are_never_fetched(service: Service, url: str) -> None:
    code, details, status = refused(service, body(lora={"path": url}))
    assert (code, status) == ("URL_NOT_ALLOWED", 400)
    assert details["lora_path"] == url.split("://")[0] + "://***"
    assert details["reason"].endswith(".")
    code, details, status = refused(service, kontext_body(ctrl_img=url))
    assert (code, details["prompt_index"], status) == ("URL_NOT_ALLOWED", 0, 400)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("https://huggingface.co/org/repo/tree/main", "LORA_URL_IS_DIRECTORY"),
        ("https://huggingface.co/org/repo", "LORA_URL_IS_DIRECTORY"),
        ("https://huggingface.co/org/repo/blob/main/a.bin", "LORA_FORMAT_NOT_SUPPORTED"),
        ("https://files.example/a.pt", "LORA_FORMAT_NOT_SUPPORTED"),
        ("https://files.example/a.CKPT", "LORA_FORMAT_NOT_SUPPORTED"),
        ("https://files.example/a.tar.gz", "LORA_FORMAT_NOT_SUPPORTED"),
        ("hf://org/repo/a.zip@main", "LORA_FORMAT_NOT_SUPPORTED"),
        ("hf://org/../etc/passwd", "URL_NOT_ALLOWED"),
        ("hf://a.safetensors", "URL_NOT_ALLOWED"),
    ],
)
def test_urls_that_name_no_lora(service: Service, path: str, code: str) -> None:
    assert refused(service, body(lora={"path": path}))[0] == code


@pytest.mark.parametrize("place", ["lora", "control image"])
def test_a_query_is_not_stored_in_clear(service: Service, place: str) -> None:
    url = f"https://files.example/a.safetensors?sig={SECRET}"
    request = body(lora={"path": url}) if place == "lora" else kontext_body(ctrl_img=url)
    assert refused(service, request) == ("SECRET_KEY_REQUIRED", {}, 400)


@pytest.mark.parametrize("sha256", ["", "a" * 63, "g" * 64, "a" * 65])
def test_a_hash_has_its_form(service: Service, sha256: str) -> None:
    assert service.post(body(lora={"sha256": sha256})).status_code == 422


@pytest.mark.parametrize(
    "path",
    [
        "../outside.safetensors",
        "../../../../etc/passwd",
        "a/../../outside.safetensors",
        "/etc/passwd",
        "/",
        "%2e%2e%2foutside.safetensors",
        "..%2foutside.safetensors",
        "%252e%252e%252foutside.safetensors",
        "..\\outside.safetensors",
        "http:\\\\good@evil/a.safetensors",
        "link_out.safetensors",
        "link_folder/outside.safetensors",
    ],
)
def test_a_path_that_leaves_the_root_is_refused_whether_a_file_is_there_or_not(
    service: Service, path: str
) -> None:
    root = service.settings.loras
    outside = root.parent / "outside.safetensors"
    link, folder = root / "link_out.safetensors", root / "link_folder"
    if not link.is_symlink():
        link.symlink_to(outside)
        folder.symlink_to(root.parent)
    outside.unlink(missing_ok=True)
    without = refused(service, body(lora={"path": path}))
    outside.write_bytes((root / "style.safetensors").read_bytes())
    assert refused(service, body(lora={"path": path})) == without
    assert (without[0], without[2]) == ("LORA_PATH_NOT_ALLOWED", 400)
    outside.unlink()


def _zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"")


def _header(text: bytes, length: int | None = None) -> Callable[[Path], object]:
    size = len(text) if length is None else length
    return lambda file: file.write_bytes(size.to_bytes(8, "little") + text)


BAD_LORAS: dict[str, Callable[[Path], object]] = {
    "weights.pt": lambda file: file.write_bytes(pickle.dumps({})),
    "weights.ckpt": lambda file: file.write_bytes(pickle.dumps({})),
    "weights.bin": lambda file: file.write_bytes(b"x"),
    "no_suffix": lambda file: file.write_bytes(b"x"),
    "pickle.safetensors": lambda file: file.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
    "zip.safetensors": _zip,
    "page.safetensors": lambda file: file.write_bytes(b"<!DOCTYPE html><html>Sign in</html>"),
    "empty.safetensors": lambda file: file.write_bytes(b""),
    "folder.safetensors": lambda file: file.mkdir(),
    "pipe.safetensors": os.mkfifo,
    "huge_length.safetensors": _header(b"{}", 2**63),
    "longer_than_file.safetensors": _header(b"{}", 1000),
    "deep.safetensors": _header(b'{"a":' * 100_000),
    "duplicate.safetensors": _header(b'{"a": 1, "a": 2}'),
    "out_of_range.safetensors": _header(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
    "no_numbers.safetensors": _header(b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}'),
}


@pytest.mark.parametrize("name", BAD_LORAS)
def test_what_is_no_intact_safetensors_file_is_refused(service: Service, name: str) -> None:
    file = service.settings.loras / name
    BAD_LORAS[name](file)
    code, details, status = refused(service, body(lora={"path": name}))
    assert (code, status) == ("LORA_FORMAT_NOT_SUPPORTED", 400)
    assert details["lora_path"] == name
    assert details["reason"]


@pytest.mark.parametrize("path", ["", ".", "style", "style.safetensors/x", "a" * 300, "x/y/z.safetensors"])
def test_a_path_that_names_no_lora(service: Service, path: str) -> None:
    code, details, status = refused(service, body(lora={"path": path}))
    # The root itself is there, but it is no file.
    assert code == ("LORA_FORMAT_NOT_SUPPORTED" if path in ("", ".") else "LORA_NOT_FOUND")
    assert (details["lora_path"], status) == (path, 400)


def test_paths_inside_the_root_are_taken_in_every_form(service: Service) -> None:
    root = service.settings.loras
    (root / "deep").mkdir()
    (root / "deep" / "link.safetensors").symlink_to(root / "style.safetensors")
    for path in (
        "./style.safetensors",
        "deep/../style.safetensors",
        "deep/link.safetensors",
        f"{root}/style.safetensors",
    ):
        assert service.post(body(lora={"path": path})).status_code == 200, path


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_control_image_is_refused(service: Service, name: str) -> None:
    request = kontext_body()
    request["prompts"].append({"prompt": "second", "ctrl_img": BAD_IMAGES[name]})
    code, details, status = refused(service, request)
    # The first prompt's image is good: it must not be stored either.
    kind = "TOO_LARGE" if name == "too many pixels" else "INVALID"
    assert (code, status, details["prompt_index"]) == (f"CONTROL_IMAGE_{kind}", 400, 1)


@pytest.mark.parametrize("size", [(63, 100), (100, 63), (64, 513), (1100, 100)])
def test_a_control_image_of_a_shape_that_flux2_does_not_take(service: Service, size: tuple[int, int]) -> None:
    images = {"ctrl_img_1": base64_png(64, 512), "ctrl_img_2": base64_png(*size)}
    assert refused(service, body(model="flux2_klein_4b", prompt=images)) == (
        "CONTROL_IMAGE_SHAPE",
        {"prompt_index": 0, "least_side": 64, "most_aspect": 8},
        400,
    )


def test_a_control_image_too_narrow_for_the_model_is_refused(service: Service) -> None:
    def request(width: int, height: int) -> dict[str, Any]:
        image = base64.b64encode(png(width, height)).decode()
        return {**kontext_body(), "model": "qwen_image_edit", "prompts": [{"prompt": "x", "ctrl_img": image}]}

    for size in ((1510, 10), (10, 1510)):
        code, details, status = refused(service, request(*size))
        assert (code, status) == ("CONTROL_IMAGE_SHAPE", 400)
        assert details == {"prompt_index": 0, "least_side": 1, "most_aspect": 150}
    assert service.post(request(10, 1500)).status_code == 200


def test_a_prompt_without_image_is_named_by_its_index(service: Service) -> None:
    request = kontext_body()
    request["prompts"] += [{"prompt": "b", "ctrl_img_2": base64_png()}, {"prompt": "c", "ctrl_img": ""}]
    assert refused(service, request) == (
        "CONTROL_IMAGE_REQUIRED",
        {"model": "flux_kontext", "prompt_index": 2},
        400,
    )


def test_refusals_leave_no_trace_in_the_job_table(service: Service) -> None:
    service.post(body(hf_token=SECRET))
    service.post(body(lora={"path": f"https://me:{SECRET}@host.example/a?sig={SECRET}"}))
    service.post(body(lora={"path": f"https://host.example/a?sig={SECRET}"}))
    for file in service.settings.loras.parent.glob("jobs.db*"):
        assert SECRET.encode() not in file.read_bytes()


def test_a_refusal_is_json_whatever_the_path_holds(service: Service) -> None:
    path = "\u202e\x1b[31m\r\n\U0001f98a.safetensors"
    answer = service.post(body(lora={"path": path}))
    assert json.loads(answer.text)["detail"]["error"]["details"]["lora_path"] == path


def test_more_loras_where_the_operator_allows_them(tmp_path: Path) -> None:
    two = [{"path": "style.safetensors", "network_multiplier": 0.5}, {"path": "style.safetensors"}]
    with serving(tmp_path, max_loras={"flux": 2}) as service:
        job = service.queue.get(service.submit(body(loras=two)))
        assert job is not None
        assert [lora["multiplier"] for lora in job.spec["loras"]] == [0.5, 1.0]
        code, details, status = refused(service, body(loras=[*two, two[0]]))
        assert (code, status, len(details["loras"])) == ("TOO_MANY_LORAS", 400, 3)
        assert (
            refused(service, body(loras=[*two[:1], {"path": "missing.safetensors"}]))[0] == "LORA_NOT_FOUND"
        )
        assert refused(service, body(model="sdxl", loras=two))[0] == "SINGLE_LORA_ONLY"
        models = {row["id"]: row["max_loras"] for row in service.client.get("/v1/models").json()["models"]}
        assert (models["flux"], models["sdxl"]) == (2, 1)
