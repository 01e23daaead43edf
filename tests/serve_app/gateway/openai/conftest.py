"""OpenAI's own client on a real gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from cluster.jobs.model import Job
from tests.serve_app.conftest import Service

LORAS = {"loras": [{"path": "style.safetensors", "network_multiplier": 0.8}]}


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """OpenAI's client with its default retries."""
    with openai.OpenAI(base_url=f"{service.client.base_url}/v1", api_key="unused") as made:
        yield made


def prompts(job: Job) -> list[dict[str, Any]]:
    return job.spec["prompts"]
