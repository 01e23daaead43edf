"""A service on SQLite and S3 for a module's faults, and what faults did, told at the end."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.service import OUTCOMES, Service, serving
from tests.s3 import BUCKET, Proxy, S3Server


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    proxy = Proxy(s3_server.url)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, s3_server: S3Server, proxy: Proxy
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("faults")
    environment = {
        **s3_server.environment,
        "AWS_ENDPOINT_URL_S3": proxy.url,
        "OUTPUT_BASE_PATH": f"s3://{BUCKET}/{uuid.uuid4()}",
        "JOBS_URL": f"sqlite:///{folder}/jobs.db",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with serving(folder, checkpoints, lease_s=4.0, environment=environment) as made:
            yield made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if OUTCOMES:
        terminalreporter.section("jobs under faults: none lost, none published twice")
    for name, outcome in OUTCOMES:
        again = "" if outcome.recovery_s is None else f", running again after {outcome.recovery_s:.1f} s"
        terminalreporter.line(f"{name}: {outcome.jobs} jobs{again}")
