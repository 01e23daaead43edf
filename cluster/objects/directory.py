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
            sync_directory(path.parent)
        except OSError as error:
            raise StoreError(f"{key} cannot be stored: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        check_key(key)
        return self._root / key
