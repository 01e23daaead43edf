"""The committed layer lists match the models that diffusers and transformers build."""

from __future__ import annotations

from importlib.resources import files

from deployments.catalog import CATALOG
from deployments.loras.adapters.architectures import ARCHITECTURES, render, shapes_of
from deployments.loras.format.layouts import layouts


def test_the_file_is_current() -> None:
    """`deployments.loras.adapters.architectures` says how to regenerate the file."""
    committed = files("deployments.loras.format").joinpath("layouts.json")
    assert committed.read_text(encoding="utf-8") == render()


def test_every_id_has_a_layout() -> None:
    assert set(layouts()) == set(CATALOG)


def test_what_is_folded_unfolds() -> None:
    models = ARCHITECTURES["hidream", "hidream_e1"]
    assert layouts()["hidream"] == {name: shapes_of(model) for name, model in models.items()}
