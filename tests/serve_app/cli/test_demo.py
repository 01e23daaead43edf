"""`lora-serve demo` as the README runs it: real requests through Ray Serve, checked by their pixels."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from serve_app.cli.demo_requests import PROMPT
from tests.drawing.judging import alternations, hollow, judge
from tests.support.service import free_port

pytestmark = pytest.mark.slow


def test_the_demo_draws_what_it_says(tmp_path: Path) -> None:
    command = [
        Path(sys.executable).with_name("lora-serve"),
        "demo",
        "--folder",
        tmp_path,
        "--port",
        free_port(),
    ]
    with tempfile.TemporaryDirectory(prefix="r") as ray_folder:
        environment = {**os.environ, "RAY_TMPDIR": ray_folder}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    def picture(name: str) -> Tensor:
        pixels = np.asarray(Image.open(tmp_path / "pictures" / f"{name}-0.png"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255

    assert PROMPT == "a green triangle on a purple background"
    plain = judge(picture("plain"))
    assert (plain.shape, plain.colour, plain.background) == ("triangle", "green", "purple")
    assert hollow(picture("outline-1.0"), plain)
    assert alternations(picture("checkerboard-1.0"), plain) >= 4
    edited = judge(picture("edit"))
    assert (edited.shape, edited.colour, edited.background) == ("triangle", "orange", "purple")
    assert Image.open(tmp_path / "pictures" / "sheet.png").width > 6 * 192
