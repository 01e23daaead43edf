"""Files of the client: what it saves, whole and with the right hash or not at all, and pictures to send."""

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
    """A file beside `path` that takes its name once it is whole; gone if the block ends before that."""

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
        """Forget what was written."""
        self._file.seek(0)
        self._file.truncate()
        self._hash = hashlib.sha256()

    def write(self, piece: bytes) -> None:
        """Take the next bytes."""
        self._hash.update(piece)
        self._file.write(piece)

    def keep(self, sha256: str | None) -> None:
        """Give the file its name; raise `DownloadFailed` if it has not this hash."""
        if sha256 is not None and self._hash.hexdigest() != sha256:
            details = {"expected": sha256, "found": self._hash.hexdigest()}
            raise DownloadFailed("SHA256_MISMATCH", "The file is not the one that the result names.", details)
        self._file.close()
        self._part.replace(self._path)


def copy_local(file_path: str, saving: Saving) -> None:
    """Copy from the server's disk, where it is also this machine's: the reference gives no URL."""
    if not os.access(file_path, os.R_OK):
        message = "The result has no URL, and its path cannot be read on this machine."
        raise DownloadFailed("NO_URL", message, {"file_path": file_path})
    with Path(file_path).open("rb") as file:
        shutil.copyfileobj(file, saving)


def picture_text(value: object) -> str:
    """Return a control image as base64: the bytes of a file, or a picture as PNG.

    Raises `TypeError` for anything else, as the `default` of `json.dumps` does.
    """
    if isinstance(value, Path):
        return base64.b64encode(value.read_bytes()).decode()
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()
    raise TypeError(f"a request cannot hold a {type(value).__name__}")
