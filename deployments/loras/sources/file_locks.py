"""Locks of files (`flock`): the kernel's, so they end with the process that held them."""

from __future__ import annotations

import fcntl
from typing import BinaryIO


def locked(lock: BinaryIO) -> bool:
    """Lock a file alone, if nobody else has it locked; tell whether that went."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
