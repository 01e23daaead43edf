"""Rows of the catalog, and their variants for previews."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import pytest

from deployments.catalog import CATALOG, ModelSpec
from deployments.catalog.lazy import Lazy

READ_BY_LOADING = {"pipeline", "checkpoint", "parts", "load_options", "adjust", "memory_gib"}


@pytest.mark.parametrize("row", CATALOG.values(), ids=list(CATALOG))
def test_a_preview_changes_what_is_read_for_each_prompt(row: ModelSpec) -> None:
    assert row.sampled("reference") is row
    preview = row.sampled("preview")
    assert (preview is row) is (row.preview is None)
    if row.preview:
        assert row.preview.differs.endswith(".")
        assert preview.id in CATALOG
        if preview.id == row.id:
            assert not READ_BY_LOADING & row.preview.fields.keys()
            assert any(getattr(row, name) != value for name, value in row.preview.fields.items())


def test_a_preview_of_flux2_diffusers_is_that_of_flux2() -> None:
    assert CATALOG["flux2_diffusers"].sampled("preview") == CATALOG["flux2"].sampled("preview")


def test_every_name_that_a_row_defers_is_there() -> None:
    """Import every lazily named function, so that a rename fails here and not in the first job."""
    found: list[Lazy] = []

    def walk(value: object) -> None:
        if isinstance(value, Lazy):
            found.append(value)
        elif isinstance(value, Mapping):
            for each in value.values():
                walk(each)
        elif is_dataclass(value):
            for each in fields(value):
                walk(getattr(value, each.name))

    walk(CATALOG)
    assert len(found) > len(CATALOG)
    for lazy in set(found):
        assert callable(lazy.load()), lazy
