from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from deployments.loras.sources.lora_root import LoraNotFound, LoraPathNotAllowed, open_lora, resolve
from deployments.spec.lora_reference import LoraNotSafetensors


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "loras"
    (root / "sub").mkdir(parents=True)
    (root / "a.safetensors").write_bytes(b"first")
    (root / "sub" / "100%25.safetensors").write_bytes(b"second")
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    return root


@pytest.mark.parametrize(
    "reference",
    [
        "a.safetensors",
        "./a.safetensors",
        "sub/../a.safetensors",
        "missing/../a.safetensors",
        "sub//..//a.safetensors",
    ],
)
def test_paths_inside_the_root(root: Path, reference: str) -> None:
    assert resolve(root, reference) == root / "a.safetensors"
    assert resolve(root, f"{root}/{reference}") == root / "a.safetensors"


def test_a_percent_sign_in_a_name_is_no_escape(root: Path) -> None:
    assert resolve(root, "sub/100%25.safetensors") == root / "sub" / "100%25.safetensors"


ESCAPES = [
    "../secret.safetensors",
    "../nothing.safetensors",
    "sub/../../secret.safetensors",
    "../loras/a.safetensors",
    "/etc/passwd",
    "/nothing/at/all.safetensors",
    "//a.safetensors",
    "a.safetensors\0",
    "..\\secret.safetensors",
    "sub\\a.safetensors",
]


@pytest.mark.parametrize("reference", [*ESCAPES, *map(quote, ESCAPES), "%2e%2e/secret.safetensors"])
def test_paths_that_leave_the_root(root: Path, reference: str) -> None:
    for _ in range(3):
        with pytest.raises(LoraPathNotAllowed):
            resolve(root, reference)
        reference = (
            reference.replace("%", "%25")
            if "%" in reference
            else quote(reference, safe="").replace(".", "%2E")
        )


def test_an_absolute_path_that_wanders_out_and_back(root: Path) -> None:
    with pytest.raises(LoraPathNotAllowed):
        resolve(root, f"{root}/../loras/a.safetensors")
    with pytest.raises(LoraPathNotAllowed):
        resolve(root, f"{root.parent}/other/../loras/a.safetensors")
    with pytest.raises(LoraPathNotAllowed):
        resolve(root, f"{root}x/a.safetensors")


def test_links(root: Path, tmp_path: Path) -> None:
    (root / "inside.safetensors").symlink_to(root / "a.safetensors")
    (root / "outside.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (root / "dangling.safetensors").symlink_to(tmp_path / "nothing.safetensors")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop.safetensors").symlink_to(root / "loop.safetensors")
    (tmp_path / "alias").symlink_to(root)
    assert resolve(root, "inside.safetensors") == root / "a.safetensors"
    for reference in ("outside.safetensors", "dangling.safetensors", "folder/secret.safetensors", "folder/x"):
        with pytest.raises(LoraPathNotAllowed):
            resolve(root, reference)
    with pytest.raises(LoraNotFound):
        resolve(root, "loop.safetensors")
    for base in (root, tmp_path / "alias"):
        assert resolve(tmp_path / "alias", f"{base}/a.safetensors") == root / "a.safetensors"


@pytest.mark.parametrize(
    "reference", ["b.safetensors", "a.safetensors/x.safetensors", "x" * 5000, "\ud800.safetensors"]
)
def test_missing_files(root: Path, reference: str) -> None:
    with pytest.raises(LoraNotFound):
        resolve(root, reference)


def test_what_is_no_safetensors_file(root: Path) -> None:
    (root / "a.pt").write_bytes(b"")
    (root / "folder.safetensors").mkdir()
    os.mkfifo(root / "pipe.safetensors")
    for reference in ("a.pt", "folder.safetensors", "pipe.safetensors", "sub", ""):
        with pytest.raises(LoraNotSafetensors):
            resolve(root, reference)


def test_codes_are_the_wire_s() -> None:
    codes = [error.code for error in (LoraPathNotAllowed, LoraNotFound, LoraNotSafetensors)]
    assert codes == ["LORA_PATH_NOT_ALLOWED", "LORA_NOT_FOUND", "LORA_FORMAT_NOT_SUPPORTED"]


def test_content_names_a_file(root: Path) -> None:
    first = open_lora(root, "a.safetensors")
    assert (first.path, first.bytes, len(first.sha256)) == (root / "a.safetensors", 5, 64)
    (root / "copy.safetensors").write_bytes(b"first")
    assert open_lora(root, "copy.safetensors").sha256 == first.sha256
    (root / "a.safetensors").write_bytes(b"other")
    assert open_lora(root, "a.safetensors").sha256 != first.sha256


opened: list[str] = []


def note_opened(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])


def test_an_unchanged_file_is_read_once(root: Path) -> None:
    sys.addaudithook(note_opened)  # This stays for the life of the process: audit hooks cannot be removed.
    path = str(root / "a.safetensors")
    first = open_lora(root, "a.safetensors")
    assert opened.count(path) == 1
    assert open_lora(root, "./a.safetensors") == first
    assert opened.count(path) == 1


def write_folder(root: Path) -> Path:
    folder = root / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_a_peft_folder_is_its_weights_and_its_configuration(root: Path) -> None:
    folder = write_folder(root)
    first = open_lora(root, "adapter")
    assert first.path == resolve(root, "adapter/") == folder / "adapter_model.safetensors"
    assert first.sha256 == hashlib.sha256(b"weights{}").hexdigest()
    (folder / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert open_lora(root, "adapter").sha256 != first.sha256


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_half_of_a_peft_folder_is_no_lora(root: Path, name: str) -> None:
    (write_folder(root) / name).unlink()
    with pytest.raises(LoraNotSafetensors):
        resolve(root, "adapter")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_what_a_peft_folder_links_to_stays_in_the_root(root: Path, name: str) -> None:
    file = write_folder(root) / name
    kept = file.rename(root / name)
    file.symlink_to(kept)
    assert resolve(root, "adapter") == root / "adapter" / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to(root.parent / "secret.safetensors")
    with pytest.raises(LoraPathNotAllowed):
        resolve(root, "adapter")
