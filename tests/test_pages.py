"""The pages of the models are what the catalogue says now."""

from __future__ import annotations

import runpy
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "models"


def test_the_pages_are_current() -> None:
    pages = runpy.run_path(str(FOLDER / "generate.py"))["render_pages"]()
    assert {path.name: path.read_text() for path in FOLDER.glob("*.md")} == pages, (
        "run `python docs/models/generate.py`"
    )
