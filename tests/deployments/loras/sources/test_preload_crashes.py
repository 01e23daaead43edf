"""An adapter whose preload crashed a process is not preloaded again by any process of the node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments.loras.sources.preload_crashes import KEPT_S, Suspects

SHA256 = "a" * 64

END = """
import os, signal, sys
from pathlib import Path
from deployments.loras.sources.preload_crashes import Suspects

with Suspects(Path(sys.argv[1])).trying(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def die(folder: Path) -> None:
    """Kill a process while it preloads."""
    ended = subprocess.run([sys.executable, "-c", END, folder, SHA256], check=False)
    assert ended.returncode == -signal.SIGKILL


def may_try(folder: Path, sha256: str = SHA256) -> bool:
    with Suspects(folder).trying(sha256) as harmless:
        return harmless


def test_what_ended_a_process_is_left_alone_for_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "suspects"
    assert may_try(folder)
    die(folder)
    assert not may_try(folder) and not may_try(folder), "a check leaves the note in place"
    assert may_try(folder, "b" * 64)
    (note,) = folder.iterdir()
    yesterday = time.time() - KEPT_S - 1
    os.utime(note, (yesterday, yesterday))
    assert may_try(folder)


def test_processes_may_prepare_the_same_at_once_and_fail(tmp_path: Path) -> None:
    with Suspects(tmp_path).trying(SHA256) as first, Suspects(tmp_path).trying(SHA256) as second:
        assert first and second
    with pytest.raises(RuntimeError), Suspects(tmp_path).trying(SHA256):
        raise RuntimeError
    assert may_try(tmp_path) and not list(tmp_path.iterdir())


def test_where_no_note_can_be_left_nothing_is_tried(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not may_try(tmp_path / "file" / "suspects")
