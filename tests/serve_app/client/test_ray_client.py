"""The gateway through its deployment handle: same routes, same keys; and mismatched versions."""

from __future__ import annotations

import asyncio
import json
import platform
from pathlib import Path

import pytest
import ray

from serve_app.builders import Gateway
from serve_app.client import LoraServeError
from serve_app.client.ray_client import check_versions
from serve_app.gateway.app import create_app
from serve_app.settings import GatewayArgs
from tests.serve_app.conftest import body, save_pair


def test_a_handle_answers_as_the_routes_do_and_asks_for_the_same_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEYS", "alice:alices-key")
    save_pair(tmp_path / "style.safetensors")
    settings = GatewayArgs.model_validate(
        {
            "jobs": f"sqlite:///{tmp_path}/jobs.db",
            "outputs": f"file://{tmp_path}/outputs",
            "loras": tmp_path,
            "base_url": "https://host/prefix",
        }
    )
    gateway = Gateway()
    gateway.app = create_app(settings)
    own = [(b"Authorization", b"Bearer alices-key"), (b"Content-Type", b"application/json")]
    content = json.dumps({"requests": [body()]}).encode()

    async def talk() -> None:
        async with gateway.app.router.lifespan_context(gateway.app):
            assert await gateway.base_url() == "https://host/prefix"
            status, headers, _ = await gateway.exchange("POST", "/v1/batches", own[1:], content)
            assert (status, dict(headers)[b"www-authenticate"]) == (401, b"Bearer")
            status, _, answer = await gateway.exchange("POST", "/v1/batches", own, content)
            assert status == 200
            (request_id,) = json.loads(answer)["request_ids"]
            status, _, answer = await gateway.exchange("GET", "/v1/requests?limit=1", own, b"")
            assert json.loads(answer)["requests"][0]["request_id"] == request_id
            status, _, answer = await gateway.exchange("GET", "/v1/requests?limit=0", own, b"")
            assert status == 422

    asyncio.run(talk())


def test_other_versions_are_told_in_one_sentence_that_says_what_to_install() -> None:
    own = platform.python_version()
    check_versions(ray.__version__, own)
    check_versions(ray.__version__, ".".join([*own.split(".")[:2], "999"]))
    with pytest.raises(LoraServeError, match="VERSION_MISMATCH") as caught:
        check_versions("2.59.0", own)
    assert 'Run `pip install "ray[client,serve]==2.59.0"`' in caught.value.message
    assert "Install Python" not in caught.value.message
    with pytest.raises(LoraServeError) as caught:
        check_versions(ray.__version__, "3.9.1")
    install = f'Install Python 3.9 and run `pip install "ray[client,serve]=={ray.__version__}"` in it'
    assert install in caught.value.message
    assert caught.value.details == {"ray": ray.__version__, "python": "3.9.1"}
