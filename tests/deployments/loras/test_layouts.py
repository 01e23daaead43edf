"""The committed layers of the real models are those that diffusers and transformers build."""

from __future__ import annotations

from pathlib import Path

from deployments import loras
from deployments.catalog import CATALOG
from deployments.loras.architectures import ARCHITECTURES, render, shapes_of
from deployments.loras.layouts import layouts


def test_the_file_is_current() -> None:
    """`python -m deployments.loras.architectures > deployments/loras/layouts.json` makes it so."""
    assert Path(loras.__file__).with_name("layouts.json").read_text(encoding="utf-8") == render()


def test_every_id_has_a_layout() -> None:
    assert set(layouts()) == set(CATALOG)


def test_what_is_folded_unfolds() -> None:
    models = ARCHITECTURES["hidream", "hidream_e1"]
    assert layouts()["hidream"] == {name: shapes_of(model) for name, model in models.items()}
