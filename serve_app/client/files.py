"""Saving downloads completely or not at all, and encoding control images."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from PIL import Image

from serve_app.client.errors import DownloadFailed


class Saving:
    """A temporary file next to `path`. `keep` renames it to `path`; without `keep` it is deleted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("wb")
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)

    def begin(self) -> None:
        """Discard what was written so far."""
        self._file.seek(0)
        self._file.truncate()
        self._hash = hashlib.sha256()

    def write(self, piece: bytes) -> None:
        """Append bytes."""
        self._hash.update(piece)
        self._file.write(piece)

    def keep(self, sha256: str | None) -> None:
        """Rename the file to its final name; raise `DownloadFailed` if its hash is not `sha256`."""
        if sha256 is not None and self._hash.hexdigest() != sha256:
            details = {"expected": sha256, "found": self._hash.hexdigest()}
            message = "The downloaded file does not match the sha256 in the result."
            raise DownloadFailed("SHA256_MISMATCH", message, details)
        self._file.close()
        self._part.replace(self._path)


def copy_local(file_path: str, saving: Saving) -> None:
    """Copy a file from a path that the server and this machine share; the reference server has no URLs."""
    if not os.access(file_path, os.R_OK):
        message = "The result has no URL, and its `file_path` cannot be read on this machine."
        raise DownloadFailed("NO_URL", message, {"file_path": file_path})
    with Path(file_path).open("rb") as file:
        shutil.copyfileobj(file, saving)


def picture_text(value: object) -> str:
    """Return a control image as base64: a file as it is, a Pillow image as PNG.

    Raises `TypeError` for anything else, as `json.dumps` expects of its `default`.
    """
    if isinstance(value, Path):
        return base64.b64encode(value.read_bytes()).decode()
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()
    raise TypeError(f"a request cannot hold a {type(value).__name__}")
