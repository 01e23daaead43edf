"""Opens the object store that a URL names."""

from __future__ import annotations

from pathlib import Path

from cluster.objects.directory import DirectoryStore
from cluster.objects.store import ObjectStore


def open_store(url: str) -> ObjectStore:
    """Return the store at `file://PATH`, a bare path, or `s3://BUCKET/PREFIX?OPTIONS` (docs/operations.md).

    Relative paths start at the working directory. One store per process is enough: all its methods are
    thread-safe. Raises `ValueError` for any other URL, without repeating it.
    """
    if url.startswith("s3://"):
        # boto3 is slow to import: only if needed.
        from cluster.objects.s3 import S3Store

        return S3Store(url)
    scheme, separator, path = url.rpartition("://")
    if (separator and scheme != "file") or not path:
        raise ValueError("outputs go to a directory or to S3: use file://PATH, a path, or s3://BUCKET/PREFIX")
    return DirectoryStore(Path(path))


def is_shared(url: str) -> bool:
    """Return whether all nodes see the same objects at `url`; a directory is of one machine."""
    return "://" in url and not url.startswith("file://")
