"""OpenAI's own client on a real gateway, and a worker that ends what it asks for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from cluster.jobs import Claim, Job
from tests.serve_app.conftest import Service

LORAS = {"loras": [{"path": "style.safetensors", "network_multiplier": 0.8}]}


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """OpenAI's client as people make it, its retries included."""
    with openai.OpenAI(base_url=f"{service.client.base_url}/v1", api_key="unused") as made:
        yield made


@contextmanager
def worker(
    service: Service, model: str = "flux", end: Callable[[Claim], None] | None = None
) -> Iterator[list[Job]]:
    """Claim jobs of a model while the block runs, and publish each or call `end`; yield those claimed."""
    claimed: list[Job] = []
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.02):
            claim = service.queue.claim(model, "worker-1")
            if claim is not None:
                claimed.append(claim.job)
                (end or service.publish)(claim)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield claimed
    finally:
        over.set()
        thread.join()


def prompts(job: Job) -> list[dict[str, Any]]:
    return job.spec["prompts"]
