"""Debian's Chromium, driven by Playwright; installed if it is missing and this user is root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright


def chromium() -> str:
    """Return the path of Chromium. If it is missing, root installs it with apt; otherwise the test fails."""
    found = shutil.which("chromium")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"apt-get {command[0]}: {done.stderr}"
        found = shutil.which("chromium")
    if found is None:
        pytest.fail("the page is tested in Chromium: install it with `sudo apt-get install chromium`")
    return found


@contextmanager
def browsing() -> Iterator[Browser]:
    """Run a browser until the block ends."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        try:
            yield browser
        finally:
            browser.close()
