"""One gateway with keys, one worker and one web server for all hostile inputs, with their logs.

Requests carry a secret in every place that can hold one; `test_traces` searches for them afterwards.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.jobs.queue import JobQueue
from cluster.net.fetcher import Fetcher, resolve_name
from cluster.net.limits import Limits
from cluster.net.urls import parse_hosts
from cluster.telemetry import JsonLines
from deployments.catalog import CATALOG
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.control_images import Controls
from deployments.engine.engine import Engine
from deployments.loras.sources.disk_cache import LoraStore
from deployments.loras.sources.loras import Loras
from deployments.worker import publish
from deployments.worker.claiming import ClaimLoop
from deployments.worker.heartbeat import Heartbeat
from tests.parity.cases import FOLDER
from tests.serve_app.conftest import Service, base64_png, serving
from tests.support.service import finished
from tests.support.web import Site, serving_site

MODEL = "flux_kontext"

LORA = FOLDER / MODEL / "lora" / "tiny_a.safetensors"

SECRET = "Sg7"
"""The prefix of every secret in the suite."""

PROMPT = "quokkamarsh"
"""Part of every prompt in the suite; tokenizers return it unchanged."""

API_KEY, SECRET_KEY, TOKEN, QUERY = "Sg7key" * 4, "Sg7master" * 4, "hf_Sg7token" * 3, "?sig=Sg7query"

MAX_LORA_BYTES = 8_000_000

PRIVATE_NAMES = {"rebound.example": ["127.0.0.1"], "half.example": ["93.184.215.14", "169.254.169.254"]}
"""The addresses that the worker's resolver returns for names that look public."""


@dataclass
class Stage:
    """The service, web server and files that the tests use."""

    service: Service
    site: Site
    folder: Path
    log: Path

    def refused(self, request: dict[str, Any]) -> tuple[int, str]:
        """Post a request that must be refused and store nothing; return the status and the error code."""
        before = self.service.stored
        answer = self.service.post(request)
        assert self.service.stored == before
        assert SECRET not in answer.text and PROMPT not in answer.text
        detail = answer.json()["detail"]
        return answer.status_code, detail[0]["type"] if answer.status_code == 422 else detail["error"]["code"]

    def outcome(self, request: dict[str, Any]) -> str | None:
        """Run a request to its end; return its error code, or None if it succeeded."""
        status = finished(self.service.client, self.service.submit(request))
        assert SECRET not in str(status) and PROMPT not in str(status)
        assert (status["error_code"] is None) == (status["status"] == "succeeded")
        return status["error_code"]

    def lora(self, name: str, data: bytes) -> str:
        """Put a file below the LoRA root; return its name."""
        (self.service.settings.loras / name).write_bytes(data)
        return name


def request(path: str = LORA.name, **changes: Any) -> dict[str, Any]:
    """Return a small valid request; `lora` and `prompt` change these parts, other arguments the top level."""
    prompt = {
        "prompt": f"{PROMPT} a red fox",
        "ctrl_img": base64_png(64, 64),
        "width": 64,
        "height": 64,
        "sample_steps": 2,
        "seed": 1,
        **changes.pop("prompt", {}),
    }
    lora = {"path": path, **changes.pop("lora", {})}
    return {"model": MODEL, "loras": [lora], "prompts": [prompt], "hf_token": TOKEN, **changes}


@pytest.fixture(scope="package")
def stage(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("hostile")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("API_KEYS", f"alice:{API_KEY}")
        patch.setenv("SECRET_KEY", SECRET_KEY)
        patch.setattr(publish, "RETRY_DELAY_S", 0.05)
        stack.enter_context(_logging_to(folder / "log"))
        site = stack.enter_context(serving_site())
        service = stack.enter_context(serving(folder, fetch_hosts=[site.host]))
        service.client.headers["Authorization"] = f"Bearer {API_KEY}"
        shutil.copy(LORA, service.settings.loras)
        stack.enter_context(_working(service, site, folder, checkpoints))
        yield Stage(service, site, folder, folder / "log")


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Write the records of all loggers, from INFO on, to a file in the service's log format."""
    handler = logging.FileHandler(file)
    handler.setFormatter(JsonLines())
    # The tests' own client logs its requests under this name.
    handler.addFilter(lambda record: record.name != "httpx")
    # Some libraries do not propagate their records to the root logger.
    loggers = [logging.root, *map(logging.getLogger, ("diffusers", "transformers"))]
    level = logging.root.level
    logging.root.setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logging.root.setLevel(level)
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


@contextmanager
def _working(service: Service, site: Site, folder: Path, checkpoints: Path) -> Iterator[None]:
    """Run a worker without Ray; its hub is `site`, and it gives up on slow servers after a second."""
    owner = "worker@hostile:1:a"
    fetcher = Fetcher(parse_hosts([site.host]), Limits(total_s=20.0, grace_s=1.0), _resolve)
    store = LoraStore(folder / "cache", 10**9)
    with closing(JobQueue(service.settings.jobs)) as queue:
        loop: ClaimLoop
        heartbeat = Heartbeat(queue, owner, MODEL, warm=lambda: loop.warm, lease_s=30.0)
        loop = ClaimLoop(
            Engine(CATALOG[MODEL], Checkpoints(checkpoints, None), device="cpu"),
            queue,
            service.store,
            heartbeat,
            owner=owner,
            loras=Loras(
                service.settings.loras, store, fetcher, max_bytes=MAX_LORA_BYTES, hub=site.url("/hub")
            ),
            controls=Controls(service.store, fetcher, service.settings.max_image_pixels),
        )
        heartbeat.start()
        loop.start()
        try:
            yield
        finally:
            loop.drain(0)
            heartbeat.close()


def _resolve(host: str, port: int) -> list[str]:
    return PRIVATE_NAMES.get(host) or resolve_name(host, port)
