"""The object store: pictures, manifests and control images as named bytes."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

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


class DirectoryStore:
    """Objects as files below one directory, for the processes of one machine.

    A file's name ends as its key does, which tells its type: `content_type` is not kept.
    """

    def __init__(self, root: Path) -> None:
        """Name the directory; it is made with the first object."""
        self._root = root.absolute()

    def put(self, key: str, data: bytes, content_type: str) -> None:  # noqa: D102
        with self._new(key) as file:
            file.write(data)

    def put_file(self, key: str, path: Path, content_type: str) -> None:  # noqa: D102
        with self._new(key) as file, path.open("rb") as source:
            shutil.copyfileobj(source, file)

    def get(self, key: str) -> bytes:  # noqa: D102
        try:
            return self._path(key).read_bytes()
        except OSError as error:
            raise StoreError(f"{key} cannot be read: {error.strerror}") from error

    def exists(self, key: str) -> bool:  # noqa: D102
        return self._path(key).is_file()

    def location(self, key: str) -> str:  # noqa: D102
        return str(self._path(key))

    def url(self, key: str, base_url: str) -> str:  # noqa: D102
        self._path(key)
        return f"{base_url}/outputs/{key}"

    def local_path(self, key: str) -> Path | None:  # noqa: D102
        try:
            path, root = self._path(key).resolve(strict=True), self._root.resolve()
        except (ValueError, OSError):
            return None
        servable = path.is_file() and path.is_relative_to(root) and not path.is_relative_to(root / PRIVATE)
        return path if servable else None

    def delete(self, prefix: str) -> None:  # noqa: D102
        path = self._path(prefix)
        try:
            while path.is_dir():
                # Where another process removes the same, what it left is removed in another round.
                with suppress(FileNotFoundError):
                    shutil.rmtree(path)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{prefix} cannot be removed: {error.strerror}") from error

    @contextmanager
    def _new(self, key: str) -> Iterator[BinaryIO]:
        """Open a file that becomes the object of `key`, on disk, when the block ends without an error."""
        path = self._path(key)
        # No key begins with a dot: what a crash leaves behind is no object.
        unfinished = path.with_name(f".{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with unfinished.open("xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
            _sync_directory(path.parent)
        except OSError as error:
            raise StoreError(f"{key} cannot be stored: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        check_key(key)
        return self._root / key


def open_store(url: str) -> ObjectStore:
    """Return the store at `file://PATH`, a bare path, or `s3://BUCKET/PREFIX?OPTIONS` (docs/operations.md).

    Relative paths start at the working directory. One store per process is enough: its methods may be called
    from any thread. Raises `ValueError` for any other URL, without repeating it.
    """
    if url.startswith("s3://"):
        # The client takes time to import: only where it is wanted.
        from cluster.objects.s3 import S3Store

        return S3Store(url)
    scheme, separator, path = url.rpartition("://")
    if (separator and scheme != "file") or not path:
        raise ValueError("outputs go to a directory or to S3: use file://PATH, a path, or s3://BUCKET/PREFIX")
    return DirectoryStore(Path(path))


def check_key(key: str) -> None:
    """Raise `ValueError` unless `key` can name an object."""
    if not KEY.fullmatch(key):
        raise ValueError(f"not a key of the object store: {key!r}")


def content_key(data: bytes) -> str:
    """Return the key of a control image: its sha256, so that equal images are stored once."""
    digest = hashlib.sha256(data).hexdigest()
    return f"{PRIVATE}/sha256/{digest[:2]}/{digest}"


def _sync_directory(directory: Path) -> None:
    """Write a directory's entries to disk; without it a new name may not survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
