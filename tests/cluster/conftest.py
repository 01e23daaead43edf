"""A job table of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.queue import JobQueue


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/jobs.db"


@pytest.fixture
def queue(url: str) -> Iterator[JobQueue]:
    queue = JobQueue(url)
    yield queue
    queue.close()
