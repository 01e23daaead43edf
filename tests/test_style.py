"""The whole tree passes the linters, and imports stay light."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYRIGHT = ["pyright", "--pythonpath", sys.executable]


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], PYRIGHT])
def test_the_tree_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "serve_app",
        "serve_app.gateway.app",
        "serve_app.cli.main",
        "serve_app.client",
        "deployments.catalog",
        "deployments.worker.replica",
    ],
)
def test_import_loads_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit(sorted({{'torch', 'diffusers', 'boto3'}} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_client_needs_no_ray() -> None:
    code = "import sys, serve_app.client; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
