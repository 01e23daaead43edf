"""Fixtures for every test folder. Nothing here needs a network: the hub is switched off.

What they import is heavy, so they import it when they are used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.studio import Studio

os.environ["HF_HUB_OFFLINE"] = "1"
for secret in ("API_KEYS", "API_KEYS_FILE", "SECRET_KEY"):
    os.environ.pop(secret, None)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of `org--name` folders: tiny checkpoints of every repository that the parity cases load."""
    from tests.parity.cases import write_mirror

    mirror = tmp_path_factory.mktemp("checkpoints")
    write_mirror(mirror)
    return mirror


@pytest.fixture(scope="session")
def new_studio(checkpoints: Path) -> Callable[..., Studio]:
    """Make a studio with an engine of its own for a model id."""
    from deployments.catalog import CATALOG
    from deployments.checkpoints import Checkpoints
    from deployments.engine import Engine
    from tests.studio import Studio

    def make(model: str, **options: Any) -> Studio:
        engine = Engine(CATALOG[model], Checkpoints(checkpoints, None), device="cpu", **options)
        engine.load()
        return Studio(engine)

    return make


@pytest.fixture(scope="session")
def studio(new_studio: Callable[..., Studio]) -> Callable[[str], Studio]:
    """Return the one warm studio of a model id, as a worker would hold it."""
    made: dict[str, Studio] = {}

    def get(model: str) -> Studio:
        if model not in made:
            made[model] = new_studio(model)
        return made[model]

    return get
