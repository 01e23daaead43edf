"""The node's disk cache of remote LoRAs, by sha256, shared by all processes of the node.

A download is written under a temporary name, checked, synced and then renamed, so every file in the cache is
complete. All locks are `flock` locks, which the kernel releases when their process ends:

- Users of a file hold a shared lock on it. The cache evicts only files that it can lock exclusively.
- The writer of a download locks it. An unlocked download was left by a crash.
- A reference is locked while it is fetched, so that only one process downloads it.
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
from deployments.loras.sources.file_locks import locked
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.preload_crashes import Suspects
from deployments.spec.lora_reference import SUFFIX

_WAIT_S = 0.05
"""Pause between two attempts to take a lock that another process holds."""

_LOCK_DIGITS = 2
"""Hex digits of a reference's hash that select its lock. References that share a lock wait for each other."""


@dataclass(slots=True)
class Lease:
    """A file in use. It stays on disk until `close`."""

    lora: LoraFile
    handle: BinaryIO

    def close(self) -> None:
        """Release the file."""
        self.handle.close()


class LoraStore:
    """A cache of `budget` bytes below `root`. Files in use are never evicted, so it may exceed the budget.

    Every method raises `OSError` if the disk fails or is full. Half-written files never become visible.
    """

    def __init__(self, root: Path, budget: int) -> None:
        """Set the directory. The first download creates it."""
        self._files = root / "files"
        self._index = root / "index"
        self._locks = root / "locks"
        self._incoming = root / "incoming"
        self._budget = budget
        self.suspects = Suspects(root / "suspects")
        self.meter = Meter("disk")

    def find(self, sha256: str) -> Lease | None:
        """Return the file with this hash (lower-case hex), or None if it is not cached."""
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
        # Eviction goes by the access time. `digest` goes by the modification time, so it must not change.
        os.utime(handle.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
        return Lease(LoraFile(path, sha256, status.st_size), handle)

    def recall(self, reference: str) -> tuple[str, str] | None:
        """Return the sha256 that `reference` had last time and the source's version of it, or None."""
        entry = _entry_of(self._entry(reference))
        return (entry["sha256"], entry["version"]) if entry else None

    def remember(self, reference: str, sha256: str, version: str) -> None:
        """Record the file of `reference`. It may hold secrets, so only a hash of it is written."""
        unfinished = self._incoming / secrets.token_hex(16)
        with self._locked():
            unfinished.write_text(json.dumps({"sha256": sha256, "version": version}))
            unfinished.replace(self._entry(reference))

    @contextmanager
    def flight(self, reference: str, tick: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of `reference`. `tick` is called while another process holds it, and may raise."""
        for folder in (self._files, self._index, self._locks, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        with (self._locks / _hashed(reference)[:_LOCK_DIGITS]).open("wb") as lock:
            while not locked(lock):
                tick()
                time.sleep(_WAIT_S)
            yield

    @contextmanager
    def incoming(self) -> Iterator[BinaryIO]:
        """Yield a file to download into. It is deleted when the block ends, unless `keep` took it.

        Use it within a `flight`.
        """
        path = self._incoming / secrets.token_hex(16)
        with self._locked():
            file = path.open("x+b")
            fcntl.flock(file, fcntl.LOCK_EX)
        with file:
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)

    def keep(self, file: BinaryIO, sha256: str) -> Lease:
        """Add a complete download to the cache and make room for it."""
        file.flush()
        os.fsync(file.fileno())
        path = self._files / f"{sha256}{SUFFIX}"
        with self._locked():
            if not path.exists():
                size = os.fstat(file.fileno()).st_size
                self.meter.holds(self._make_room(size) + size)
                fcntl.flock(file, fcntl.LOCK_SH)  # From here on the writer is an ordinary user.
                Path(file.name).rename(path)
                sync_directory(self._files)
            lease = self.find(sha256)
        assert lease is not None  # noqa: S101 - eviction needs the lock held here
        return lease

    def evict(self) -> bool:
        """Remove every file that is not in use, because the disk is full. Return whether any was removed."""
        with self._locked():
            gone = [path.stem for path in self._files.iterdir() if _remove_unused(path)]
            for sha256 in gone:
                self._forget(sha256)
        return bool(gone)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the cache's directories."""
        with (self._locks / "store").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> int:
        """Evict the least recently used files until `size` bytes fit. Also delete what crashes left.

        Files in use stay. Returns the bytes of the files that stay.
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
    """Read an index entry. Returns {} if it is missing or was damaged by a power loss."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _remove_unused(path: Path) -> bool:
    """Remove a file unless it is locked or already gone. Return whether it was removed."""
    try:
        with path.open("rb") as file:
            if unused := locked(file):
                path.unlink()
    except FileNotFoundError:
        return False
    return unused
