"""Records LoRAs that crashed a process while they were preloaded, so that they are not preloaded again.

Such a LoRA is only loaded for a claimed job, whose attempts are limited. A preload is no attempt of its job,
so without these records a LoRA could crash one worker after another. Each crash would cost the job that runs
there one attempt.
"""

from __future__ import annotations

import fcntl
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from deployments.loras.sources.file_locks import locked

KEPT_S = 86_400.0
"""Seconds that a record counts. It expires, since the process may have died for another reason."""


class Suspects:
    """Records in a directory of this node, shared by all its processes.

    A process locks (`flock`) its record while it preloads. An unlocked record was left by a dead process.
    """

    def __init__(self, folder: Path) -> None:
        """Set the directory. The first record creates it."""
        self._folder = folder

    @contextmanager
    def trying(self, sha256: str) -> Iterator[bool]:
        """Record for the block that a LoRA is being preloaded. Yields whether it may be.

        It may not if a process died while preloading it, or if the record cannot be written.
        """
        record = None if self._suspected(sha256) else self._record(sha256)
        try:
            yield record is not None
        finally:
            if record:
                Path(record.name).unlink(missing_ok=True)
                record.close()

    def _suspected(self, sha256: str) -> bool:
        for record in self._folder.glob(f"{sha256}.*"):
            with suppress(FileNotFoundError), record.open("rb") as file:
                if locked(file) and time.time() - record.stat().st_mtime < KEPT_S:
                    return True
        return False

    def _record(self, sha256: str) -> BinaryIO | None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            record = (self._folder / f"{sha256}.{secrets.token_hex(8)}").open("xb")
        except OSError:
            return None
        fcntl.flock(record, fcntl.LOCK_EX)
        return record
