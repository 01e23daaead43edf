"""What every object store can do, and the keys that name objects in it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Protocol

PRIVATE = "inputs"
"""First part of the keys of what clients sent; never served."""

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"

KEY = re.compile(rf"{_PART}(?:/{_PART})*")
"""What names an object, in every store alike."""


class StoreError(Exception):
    """The store cannot do what it was asked for now: disk full, away, or no such object."""


class ObjectStore(Protocol):
    """Named bytes. A key is parts of letters, digits, `.`, `_` and `-`, joined by `/`.

    Every method raises `ValueError` for any other key, and `StoreError` when the store fails.
    """

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store `data`, at once and on disk, or not at all; an object of that key is replaced."""
        ...

    def put_file(self, key: str, path: Path, content_type: str) -> None:
        """Store a file as `put` stores bytes, without holding it in memory; the file stays where it is."""
        ...

    def get(self, key: str) -> bytes:
        """Return the bytes of an object."""
        ...

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        ...

    def location(self, key: str) -> str:
        """Return where the object lies, as users of the machine or bucket name it."""
        ...

    def url(self, key: str, base_url: str) -> str:
        """Return where clients fetch the object: below the gateway at `base_url`, or in the store itself.

        Who has the URL may read the object: it must not be logged or kept.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """Return the file that the gateway may serve for `key`, None for whatever else a client asks for."""
        ...

    def delete(self, prefix: str) -> None:
        """Remove the object named `prefix` and all objects below `prefix/`; there may be none."""
        ...


def check_key(key: str) -> None:
    """Raise `ValueError` unless `key` can name an object."""
    if not KEY.fullmatch(key):
        raise ValueError(f"not a key of the object store: {key!r}")


def content_key(data: bytes) -> str:
    """Return the key of a control image: its sha256, so that equal images are stored once."""
    digest = hashlib.sha256(data).hexdigest()
    return f"{PRIVATE}/sha256/{digest[:2]}/{digest}"
