"""File locks (`flock`). The kernel releases them when their process ends."""

from __future__ import annotations

import fcntl
from typing import BinaryIO


def locked(lock: BinaryIO) -> bool:
    """Try to lock a file exclusively, without waiting. Return whether it is locked now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
