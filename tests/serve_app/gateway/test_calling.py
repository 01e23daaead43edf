"""The examples in docs/calling.md, and those with OpenAI's client on other pages, run on a real gateway."""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.serve_app.conftest import Service, rendering, save_pair, serving
from tests.support.service import free_port

DOCS = Path(__file__).parents[3] / "docs"

URL = "http://127.0.0.1:8000"


def blocks(language: str, page: str = "calling.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, port = tmp_path_factory.mktemp("calling"), free_port()
    with serving(folder, port, base_url=f"http://127.0.0.1:{port}") as running:
        save_pair(folder / "loras" / "my_style.safetensors")
        yield running


def test_the_commands(service: Service, tmp_path: Path) -> None:
    script = "".join(blocks("sh")).replace(URL, service.settings.base_url)
    with rendering(service) as foxes, rendering(service, "flux_kontext") as edits:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    sizes = {
        path.name: Image.open(path).size for path in tmp_path.iterdir() if path.suffix in (".jpg", ".png")
    }
    assert sizes == {
        "fox.jpg": (1024, 768),
        "winter.jpg": (1024, 1024),
        "0.png": (1024, 1024),
        "1.png": (1024, 1024),
    }
    assert [len(job.spec["prompts"]) for job in foxes] == [1, 2]
    (edited,) = edits
    (picture,) = edited.spec["prompts"][0]["controls"]
    assert Image.open(io.BytesIO(service.store.get(picture))).size == (1024, 768)
    *_, last = done.stdout.splitlines()
    assert last == "JOB_ALREADY_FINISHED"


def test_the_node_gives_pictures_as_comfyui_wants_them(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SERVE_URL", service.settings.base_url)
    module: dict[str, Any] = {}
    (code,) = blocks("python")
    exec(code, module)
    (node,) = module["NODE_CLASS_MAPPINGS"].values()
    required = node.INPUT_TYPES()["required"]
    asked = {name: options[0]["default"] for name, (_, *options) in required.items() if name != "prompt"}
    with rendering(service) as claimed:
        (pictures,) = getattr(node(), node.FUNCTION)(
            prompt="a fox", **{**asked, "n": 2, "width": 128, "height": 64}
        )
    assert node.RETURN_TYPES == ("IMAGE",)
    assert (pictures.shape, pictures.dtype) == ((2, 64, 128, 3), torch.float32)
    expected = torch.tensor([200, 30, 90]) / 255
    assert torch.allclose(pictures, expected.expand_as(pictures))
    assert [prompt["seed"] for prompt in claimed[0].spec["prompts"]] == [42, 43]


@pytest.mark.parametrize("page", ["api.md", "clients.md"])
def test_openais_client_as_the_pages_show_it(
    service: Service, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = (block for block in blocks("python", page) if "import OpenAI" in block)
    with rendering(service), rendering(service, "flux_kontext"):
        exec(code.replace(URL, service.settings.base_url), {})
    assert f"{service.settings.base_url}/outputs/" in capsys.readouterr().out
