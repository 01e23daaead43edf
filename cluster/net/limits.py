"""Limits on the bytes, time and rate of a fetch, by HTTP or otherwise, and the errors of a fetch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO


class FetchFault(StrEnum):
    """Why a fetch failed. Only `UNREACHABLE` is worth a retry."""

    NOT_ALLOWED = "not_allowed"
    NOT_FOUND = "not_found"
    DENIED = "denied"
    TOO_LARGE = "too_large"
    UNUSABLE = "unusable"
    UNREACHABLE = "unreachable"


class FetchError(Exception):
    """A fetch failed. The message is a sentence that may name the host, never a path, query or credential."""

    def __init__(self, fault: FetchFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault

    @property
    def retry(self) -> bool:
        """True if another attempt may help."""
        return self.fault is FetchFault.UNREACHABLE


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a fetch: `total_s` seconds; after `grace_s` seconds at least `min_rate` bytes per second."""

    total_s: float = 1800.0
    grace_s: float = 30.0
    min_rate: float = 16 * 1024
    redirects: int = 5


LIMITS = Limits()


class Pace:
    """Enforces the limits of one fetch. Calls `tick` for each piece, which may raise to abort the fetch."""

    def __init__(self, limits: Limits, tick: Callable[[], None]) -> None:
        self._limits = limits
        self._begun = time.monotonic()
        self._bytes = 0
        self._tick = tick

    def left(self) -> float:
        """Return the timeout for the next network operation. Raises `FetchError` if the time is up."""
        left = self._begun + self._limits.total_s - time.monotonic()
        if left <= 0:
            raise FetchError(
                FetchFault.UNREACHABLE, f"The transfer took longer than {self._limits.total_s:.0f} s."
            )
        return min(left, self._limits.grace_s)

    def over(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yield `pieces` and count their bytes."""
        for piece in pieces:
            self.note(len(piece))
            yield piece

    def note(self, size: int) -> None:
        """Count received bytes. Raises `FetchError` if they arrive too slowly or too late."""
        self._tick()
        self.left()
        self._bytes += size
        late = time.monotonic() - self._begun - self._limits.grace_s
        if self._bytes < late * self._limits.min_rate:
            raise FetchError(FetchFault.UNREACHABLE, "The server sends too slowly.")


def copy(pieces: Iterable[bytes], into: BinaryIO, max_bytes: int) -> tuple[str, int]:
    """Write `pieces` to a file as they arrive. Return their sha256 in hex and their total size.

    Raises `FetchError` if there are more than `max_bytes`, and `OSError` if the file cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        size += len(piece)
        if size > max_bytes:
            raise too_large(max_bytes)
        digest.update(piece)
        into.write(piece)
    return digest.hexdigest(), size


def too_large(max_bytes: int) -> FetchError:
    """Build the error for a body that is larger than allowed."""
    return FetchError(FetchFault.TOO_LARGE, f"The file is larger than {max_bytes} bytes.")
