"""Fixtures for every test folder. None needs a network: the Hugging Face hub is switched off.

The fixtures import heavy modules only when they are used.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.s3 import Proxy, S3Server
    from tests.support.studio import Studio

# The time of an example depends more on the machine than on the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

os.environ["HF_HUB_OFFLINE"] = "1"
# The tensors are tiny: more threads in each of several processes would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
for secret in ("API_KEYS", "API_KEYS_FILE", "SECRET_KEY", "WEBHOOK_SECRET"):
    os.environ.pop(secret, None)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of `org--name` folders: tiny checkpoints of all repositories that the parity cases load."""
    from tests.parity.cases import write_mirror

    mirror = tmp_path_factory.mktemp("checkpoints")
    write_mirror(mirror)
    return mirror


@pytest.fixture(scope="session")
def new_studio(checkpoints: Path) -> Callable[..., Studio]:
    """Return a factory of studios: model id to a studio with its own engine."""
    from deployments.catalog import CATALOG
    from deployments.engine.checkpoints import Checkpoints
    from deployments.engine.engine import Engine
    from tests.support.studio import Studio

    def make(model: str, **options: Any) -> Studio:
        engine = Engine(CATALOG[model], Checkpoints(checkpoints, None), device="cpu", **options)
        engine.load()
        return Studio(engine)

    return make


@pytest.fixture(scope="session")
def studio(new_studio: Callable[..., Studio]) -> Callable[[str], Studio]:
    """Return a function from a model id to its one shared, warm studio, as a worker would hold it."""
    made: dict[str, Studio] = {}

    def get(model: str) -> Studio:
        if model not in made:
            made[model] = new_studio(model)
        return made[model]

    return get


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for all tests."""
    from tests.support.s3 import serving_s3

    with serving_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of the test's own store. The environment names its server and holds valid keys."""
    from tests.support.s3 import BUCKET

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4()}"


@pytest.fixture
def s3_proxy(s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy between the server and the S3 stores that the test makes."""
    from tests.support.s3 import Proxy

    proxy = Proxy(s3_server.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    yield proxy
    proxy.close()
