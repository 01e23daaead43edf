"""Says at the end what the faults did."""

from __future__ import annotations

import pytest

from tests.faults.service import OUTCOMES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if OUTCOMES:
        terminalreporter.section("jobs under faults: none lost, none published twice")
    for name, outcome in OUTCOMES:
        again = "" if outcome.recovery_s is None else f", running again after {outcome.recovery_s:.1f} s"
        terminalreporter.line(f"{name}: {outcome.jobs} jobs{again}")
