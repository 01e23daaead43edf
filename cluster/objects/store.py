"""The interface of every object store, and the keys of objects."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Protocol

PRIVATE = "inputs"
"""First part of the keys of clients' uploads. Never served."""

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"

KEY = re.compile(rf"{_PART}(?:/{_PART})*")
"""Valid keys, the same for every store."""


class StoreError(Exception):
    """The store failed: it is full or unreachable, it refused the request, or there is no such object."""


class ObjectStore(Protocol):
    """Stores bytes under keys. A key is parts of letters, digits, `.`, `_` and `-`, joined by `/`.

    Every method raises `ValueError` for any other key, and `StoreError` if the store fails.
    """

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store `data` durably and atomically. Replaces an existing object."""
        ...

    def put_file(self, key: str, path: Path, content_type: str) -> None:
        """Store a copy of a file as `put` does, without loading it into memory."""
        ...

    def get(self, key: str) -> bytes:
        """Return the bytes of an object."""
        ...

    def exists(self, key: str) -> bool:
        """Return whether the object exists."""
        ...

    def location(self, key: str) -> str:
        """Return where the object is stored: its path, or its `s3://` URL."""
        ...

    def url(self, key: str, base_url: str) -> str:
        """Return the URL for clients: below the gateway at `base_url`, or presigned for the store itself.

        Anyone with a presigned URL can read the object, so do not log or store it.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """Return the file that the gateway may serve for `key`, None if there is none. Accepts any text."""
        ...

    def delete(self, prefix: str) -> None:
        """Remove the object `prefix` and all objects below `prefix/`, if there are any."""
        ...


def check_key(key: str) -> None:
    """Raise `ValueError` unless `key` can name an object."""
    if not KEY.fullmatch(key):
        raise ValueError(f"not a key of an object: {key!r}")


def content_key(data: bytes) -> str:
    """Return the key of a control image. It contains the sha256, so equal images are stored only once."""
    digest = hashlib.sha256(data).hexdigest()
    return f"{PRIVATE}/sha256/{digest[:2]}/{digest}"
