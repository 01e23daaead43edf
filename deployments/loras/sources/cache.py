"""LoRA files from elsewhere on this node's disk, by their sha256, shared by all its processes.

A file is written under another name, judged, synced and then renamed: what is in the store is whole. Locks
(`flock`) are the kernel's and end with the process that held them:

- a file in use is locked shared by its users; the store evicts only what it can lock alone,
- a download is locked by its writer; one that nobody holds is a crash's leftover,
- a reference is locked while it is fetched, so that of several processes one downloads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.durable import sync_directory
from cluster.metrics import Meter
from deployments.loras.sources.crash_suspects import Suspects
from deployments.loras.sources.file_locks import locked
from deployments.loras.sources.lora_root import LoraFile
from deployments.spec.lora_reference import SUFFIX

_WAIT_S = 0.05
"""Pause between two tries of a lock that another process holds."""

_STRIPES = 2
"""Hex digits of a reference's hash that choose its lock: 256 locks, however many references there are."""


@dataclass(slots=True)
class Lease:
    """A file in use: it stays on disk until `close`."""

    lora: LoraFile
    handle: BinaryIO

    def close(self) -> None:
        """Let go."""
        self.handle.close()


class LoraStore:
    """Files below `root`, of `budget` bytes; what is in use is never evicted and may overshoot them.

    Every method raises `OSError` where the disk fails or is full; nothing half-written is visible then.
    """

    def __init__(self, root: Path, budget: int) -> None:
        """Name the directory; it is made with the first download."""
        self._files = root / "files"
        self._index = root / "index"
        self._locks = root / "locks"
        self._incoming = root / "incoming"
        self._budget = budget
        self.suspects = Suspects(root / "suspects")
        self.meter = Meter("disk")

    def find(self, sha256: str) -> Lease | None:
        """Return the file of this content (hex, lower case), if it is here."""
        path = self._files / f"{sha256}{SUFFIX}"
        try:
            handle = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        status = os.fstat(handle.fileno())
        if not status.st_nlink:  # Evicted between open and lock.
            handle.close()
            return None
        # The access time is what eviction goes by; the other one tells whether the content changed.
        os.utime(handle.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
        return Lease(LoraFile(path, sha256, status.st_size), handle)

    def recall(self, reference: str) -> tuple[str, str] | None:
        """Return the sha256 that `reference` led to last time, and the source's name for that version."""
        entry = _entry_of(self._entry(reference))
        return (entry["sha256"], entry["version"]) if entry else None

    def remember(self, reference: str, sha256: str, version: str) -> None:
        """Note what `reference` leads to; only its hash is written, for it may hold secrets."""
        unfinished = self._incoming / secrets.token_hex(16)
        with self._alone():
            unfinished.write_text(json.dumps({"sha256": sha256, "version": version}))
            unfinished.replace(self._entry(reference))

    @contextmanager
    def flight(self, reference: str, tick: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of `reference`; `tick` is called while another process holds it, and may raise."""
        for folder in (self._files, self._index, self._locks, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        with (self._locks / _hashed(reference)[:_STRIPES]).open("wb") as lock:
            while not locked(lock):
                tick()
                time.sleep(_WAIT_S)
            yield

    @contextmanager
    def incoming(self) -> Iterator[BinaryIO]:
        """Give a file to download into; it is gone when the block ends, unless it was kept.

        To be used within a `flight`.
        """
        path = self._incoming / secrets.token_hex(16)
        with self._alone():
            file = path.open("x+b")
            fcntl.flock(file, fcntl.LOCK_EX)
        with file:
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)

    def keep(self, file: BinaryIO, sha256: str) -> Lease:
        """Take a complete download into the store and make room for it."""
        file.flush()
        os.fsync(file.fileno())
        path = self._files / f"{sha256}{SUFFIX}"
        with self._alone():
            if not path.exists():
                size = os.fstat(file.fileno()).st_size
                self.meter.holds(self._make_room(size) + size)
                fcntl.flock(file, fcntl.LOCK_SH)  # The downloader is a user like any other now.
                Path(file.name).rename(path)
                sync_directory(self._files)
            lease = self.find(sha256)
        assert lease is not None  # noqa: S101 - whoever evicts holds the same lock
        return lease

    def evict(self) -> bool:
        """Remove all that is not in use, for a disk that is full before the budget is; tell if any was."""
        with self._alone():
            gone = [path.stem for path in self._files.iterdir() if _remove_unused(path)]
            for sha256 in gone:
                self._forget(sha256)
        return bool(gone)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of the store's directories."""
        with (self._locks / "store").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> int:
        """Evict files that are not in use, the least recently used first; remove what crashes left.

        Returns the bytes of the files that stay.
        """
        for leftover in self._incoming.iterdir():
            _remove_unused(leftover)
        files = sorted((path.stat().st_atime_ns, path.stat().st_size, path) for path in self._files.iterdir())
        held = sum(file_size for _, file_size, _ in files)
        for _, file_size, path in files:
            if held + size <= self._budget:
                break
            if _remove_unused(path):
                held -= file_size
                self._forget(path.stem)
        return held

    def _forget(self, sha256: str) -> None:
        for entry in self._index.iterdir():
            if _entry_of(entry).get("sha256") == sha256:
                entry.unlink()

    def _entry(self, reference: str) -> Path:
        return self._index / _hashed(reference)


def _hashed(reference: str) -> str:
    return hashlib.sha256(reference.encode()).hexdigest()


def _entry_of(path: Path) -> dict[str, str]:
    """Read an entry of the index; it is empty where there is none, or a power loss left it so."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _remove_unused(path: Path) -> bool:
    """Remove a file unless somebody holds its lock, or was quicker."""
    try:
        with path.open("rb") as file:
            if unused := locked(file):
                path.unlink()
    except FileNotFoundError:
        return False
    return unused
