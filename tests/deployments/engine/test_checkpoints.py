from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.failures import FailureCode, JobFailure
from deployments.catalog import Checkpoint, Part
from deployments.engine.checkpoints import Checkpoints

COMMIT = "0123456789abcdef0123456789abcdef01234567"

INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
}

FILES = {
    "model_index.json": json.dumps(INDEX),
    "README.md": "",
    "flux1-dev.safetensors": "a large file that nobody needs",
    "model.safetensors": "a model without a folder",
    "scheduler/scheduler_config.json": "{}",
    "unet/config.json": "{}",
    "unet/model.safetensors": "plain",
    "unet/twice_model.safetensors": "the same once more",
    "unet/model.bin": "a pickle",
    "safety_checker/model.safetensors": "not wanted",
    "unet/old/model.safetensors": "not wanted",
}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download needs."""

    files = FILES

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        content = None
        if self.path.startswith(("/api/models/org/name/revision/", "/api/models/org/name?")):
            files = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": files}).encode()
        elif self.path.startswith("/api/models/org/name/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()
            ]
            content = json.dumps(tree).encode()
        elif self.path.startswith("/org/name/resolve/"):
            text = self.files.get(self.path.split("/", 5)[5])
            content = None if text is None else text.encode()
        self.send_response(200 if content is not None else 404)
        content = content or b""
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(params=["plain", "fp16"])
def hub(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The URL of a hub, with or without files of the variant, and the name of the expected weights."""
    extra = {"unet/model.fp16.safetensors": "half"} if request.param == "fp16" else {}
    handler = type("Handler", (Hub,), {"files": FILES | extra})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", "model.fp16.safetensors" if extra else "model.safetensors"
    server.shutdown()


LOCATE = """
import sys
from pathlib import Path
from deployments.catalog import Checkpoint, Part
from deployments.engine.checkpoints import Checkpoints
checkpoint = Checkpoint(repo=sys.argv[1], variant="fp16", without=("unet/twice*",))
checkpoints, folders = Checkpoints(None, Path(sys.argv[2])), sys.argv[3:]
if folders:
    part = Part(class_name="diffusers.UNet2DConditionModel", checkpoint=checkpoint, folder=folders[0])
    found = checkpoints.locate_part(part)
else:
    found = checkpoints.locate(checkpoint, without=["safety_checker"])
print(found.revision, found.variant)
for file in sorted(found.directory.rglob("*.*")):
    print(file.relative_to(found.directory))
"""


def locate(repo: str, address: str, cache: Path, *folder: str) -> subprocess.CompletedProcess[str]:
    """Run `Checkpoints` against a hub in a new process, because the hub's URL is read once per process.

    With a folder, locate a part instead of the checkpoint.
    """
    return subprocess.run(
        [sys.executable, "-c", LOCATE, repo, cache, *folder],
        env={**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )


def test_from_the_hub_only_needed_files_come(hub: tuple[str, str], tmp_path: Path) -> None:
    address, weights = hub
    done = locate("org/name", address, tmp_path)
    assert done.returncode == 0, done.stderr
    first, *files = done.stdout.splitlines()
    assert first == f"{COMMIT} {'fp16' if 'fp16' in weights else None}"
    assert files == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{weights}",
    ]


def test_of_a_part_only_its_folder_comes(hub: tuple[str, str], tmp_path: Path) -> None:
    done = locate("org/name", hub[0], tmp_path, "unet")
    assert done.returncode == 0, done.stderr
    first, *files = done.stdout.splitlines()
    assert first == f"{COMMIT} None"
    assert "config.json" in files
    assert "model.safetensors" in files
    assert not any("old" in file or file.endswith(".bin") for file in files)
    done = locate("org/name", hub[0], tmp_path, "")
    top = [file for file in done.stdout.splitlines()[1:] if "/" not in file]
    assert top == ["model.safetensors", "model_index.json"]


def test_a_repository_that_the_hub_does_not_give_says_so(hub: tuple[str, str], tmp_path: Path) -> None:
    done = locate("org/other", hub[0], tmp_path)
    assert "JobFailure: org/other: no checkpoint directory is set, and the hub says" in done.stderr


def test_a_local_folder_comes_first(tmp_path: Path) -> None:
    unet = tmp_path / "org--name" / "unet"
    unet.mkdir(parents=True)
    (unet / "model.safetensors").touch()
    checkpoint = Checkpoint(repo="org/name", variant="fp16")
    found = Checkpoints(tmp_path, None).locate(checkpoint)
    assert (found.directory, found.revision, found.variant) == (tmp_path / "org--name", "local", None)
    (unet / "model.fp16-00001-of-00002.safetensors").touch()
    assert Checkpoints(tmp_path, None).locate(checkpoint).variant == "fp16"


def test_a_part_in_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "org--name" / "unet").mkdir(parents=True)
    for folder in ("unet", ""):
        part = Part(class_name="torch.nn.Module", checkpoint=Checkpoint(repo="org/name"), folder=folder)
        found = Checkpoints(tmp_path, None).locate_part(part)
        assert (found.directory, found.revision) == (tmp_path / "org--name" / folder, "local")


def test_a_lora_is_the_one_file_of_its_repository(tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "org--name", Checkpoint(repo="org/name")
    (folder / "old").mkdir(parents=True)
    for name in ("README.md", "old/other.safetensors", "any_name.safetensors"):
        (folder / name).touch()
    assert Checkpoints(tmp_path, None).locate_lora(checkpoint) == folder / "any_name.safetensors"
    (folder / "another.safetensors").touch()
    with pytest.raises(JobFailure, match=r"org/name: expected exactly one \.safetensors file"):
        Checkpoints(tmp_path, None).locate_lora(checkpoint)


@pytest.mark.parametrize("root", ["mirror", None])
def test_offline_a_missing_checkpoint_says_so(tmp_path: Path, root: str | None) -> None:
    with pytest.raises(JobFailure, match=r"org/name.*HF_HUB_OFFLINE") as caught:
        Checkpoints(tmp_path / root if root else None, None).locate(Checkpoint(repo="org/name"))
    assert caught.value.code is FailureCode.MODEL_LOAD_FAILED
