"""LoRAs whose preparation ended a process: those are prepared for a claimed job alone, whose attempts count.

What is prepared ahead of its job is nobody's attempt. Without these notes it could end one worker after the
other, each time at the cost of the job that runs there.
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
"""How long a note is believed, in seconds: a process may have ended for another reason just then."""


class Suspects:
    """Notes in a directory of this node, shared by all its processes.

    A note is locked (`flock`) by the process that prepares; one that nobody holds is a dead process's.
    """

    def __init__(self, folder: Path) -> None:
        """Name the directory; it is made with the first note."""
        self._folder = folder

    @contextmanager
    def trying(self, sha256: str) -> Iterator[bool]:
        """Note for the block that an adapter is being prepared; yield whether it may be.

        It may not where a process ended while it did, nor where the disk takes no note.
        """
        note = None if self._suspected(sha256) else self._leave(sha256)
        try:
            yield note is not None
        finally:
            if note:
                Path(note.name).unlink(missing_ok=True)
                note.close()

    def _suspected(self, sha256: str) -> bool:
        for note in self._folder.glob(f"{sha256}.*"):
            with suppress(FileNotFoundError), note.open("rb") as file:
                if locked(file) and time.time() - note.stat().st_mtime < KEPT_S:
                    return True
        return False

    def _leave(self, sha256: str) -> BinaryIO | None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            note = (self._folder / f"{sha256}.{secrets.token_hex(8)}").open("xb")
        except OSError:
            return None
        fcntl.flock(note, fcntl.LOCK_EX)
        return note
