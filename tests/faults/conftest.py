"""A service on SQLite and S3 for a module's faults, and a report of the outcomes at the end."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.faults.service import OUTCOMES, Service, serving
from tests.support.s3 import BUCKET, Proxy, S3Server


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Pass the outcomes of the test's faults to the process that reports."""
    OUTCOMES.clear()
    result = yield
    item.user_properties += [("fault", outcome) for outcome in OUTCOMES]
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report the outcome of each fault. Tests with jobs lost or published twice have failed already."""
    terminalreporter.section("jobs in flight, none lost, none published twice; recovery")
    for report in terminalreporter.getreports("passed"):
        for in_flight, recovery_s in (value for name, value in report.user_properties if name == "fault"):
            recovery = "-" if recovery_s is None else f"{recovery_s:.1f} s"
            terminalreporter.line(f"{in_flight:4} {recovery:>8}  {report.nodeid.split('::')[-1]}")
