"""The object store in a directory, for the processes of one machine."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cluster.durable import sync_directory
from cluster.objects.store import PRIVATE, StoreError, check_key


class DirectoryStore:
    """Stores objects as files below one directory, for the processes of one machine.

    `content_type` is not stored. The file keeps the extension of its key, which implies the type.
    """

    def __init__(self, root: Path) -> None:
        """Set the directory. The first stored object creates it."""
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
                # If another process deletes the same files, try again with those that are left.
                with suppress(FileNotFoundError):
                    shutil.rmtree(path)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{prefix} cannot be removed: {error.strerror}") from error

    @contextmanager
    def _new(self, key: str) -> Iterator[BinaryIO]:
        """Open a new file. If the block succeeds, it is flushed to disk and becomes the object `key`."""
        path = self._path(key)
        # Keys never start with a dot, so a file left by a crash is not an object.
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
            sync_directory(path.parent)
        except OSError as error:
            raise StoreError(f"{key} cannot be stored: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        check_key(key)
        return self._root / key
