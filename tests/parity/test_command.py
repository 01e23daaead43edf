"""`lora-serve render` as a process: failures and messages. The golden cases are in `test_goldens.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.parity.cases import load_cases

COMMAND = Path(sys.executable).with_name("lora-serve")


def render(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, "render", *map(str, arguments)], capture_output=True, text=True)


def options(checkpoints: Path, loras: Path, out: Path) -> list[object]:
    return ["--checkpoints", checkpoints, "--loras", loras, "--out", out, "--device", "cpu"]


def test_a_failed_request_is_told_and_the_others_are_rendered(checkpoints: Path, tmp_path: Path) -> None:
    case = next(case for case in load_cases() if case.model == "flux")
    bodies = {
        "good": case.request,
        "nowhere": {**case.request, "loras": [{"path": "nowhere.safetensors"}]},
        "wrong": {**case.request, "prompts": [{"prompt": "x", "width": 63}]},
        "garbled": "not an object",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(body))
    files = [tmp_path / f"{name}.json" for name in ("nowhere", "wrong", "garbled", "absent", "good")]
    out = tmp_path / "out"
    done = render(*files, *options(checkpoints, case.loras, out))
    assert done.returncode == 1

    def code(name: str) -> str | None:
        return json.loads((out / name / "manifest.json").read_text()).get("error_code")

    codes = [code(file.stem) for file in files]
    assert codes == ["LORA_NOT_FOUND", "INVALID_REQUEST", "INVALID_REQUEST", "FILE_ERROR", None]
    assert "LORA_NOT_FOUND" in done.stderr
    case.check([np.load(out / "good" / "0.npy")])


def test_two_requests_of_one_name_are_refused(tmp_path: Path) -> None:
    done = render(tmp_path / "a" / "x.json", tmp_path / "b" / "x.json", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()
