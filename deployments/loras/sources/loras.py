"""Opens the LoRAs of jobs, wherever they are stored: below the LoRA root, on the web, on the hub, in S3.

Remote LoRAs are downloaded into the node's cache, checked by their header, and leased to the job. Each time,
the source is asked whether the cached file is still current, unless the job gives the file's sha256. Imports
no torch.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Self, TypeAlias
from urllib.parse import quote

from huggingface_hub import constants, get_token

from cluster.failures import FailureCode, JobFailure
from cluster.metrics import Meter
from cluster.net.fetcher import Fetched, Fetcher
from cluster.net.limits import FetchError, FetchFault
from cluster.net.urls import Url, parse_url
from deployments.loras.format.file_modules import judge
from deployments.loras.format.header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    header_bytes,
    parse_header,
    read_header,
)
from deployments.loras.sources.buckets import Buckets
from deployments.loras.sources.disk_cache import Lease, LoraStore
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.lora_root import open_lora
from deployments.settings import RenderSettings
from deployments.spec.job import LoraSpec
from deployments.spec.lora_reference import (
    BucketFile,
    HubFile,
    LoraReferenceError,
    RemoteFile,
    RootFile,
    WebFile,
    check,
    unsigned,
)

_CODES = {
    FetchFault.NOT_ALLOWED: FailureCode.URL_NOT_ALLOWED,
    FetchFault.NOT_FOUND: FailureCode.LORA_NOT_FOUND,
    FetchFault.DENIED: FailureCode.LORA_ACCESS_DENIED,
    FetchFault.TOO_LARGE: FailureCode.LORA_TOO_LARGE,
    FetchFault.UNUSABLE: FailureCode.LORA_UNREACHABLE,
    FetchFault.UNREACHABLE: FailureCode.LORA_UNREACHABLE,
}

_SHA256 = re.compile(r"[0-9a-f]{64}")

# "<" is not enough: a safetensors file with a header of 60 bytes starts with it too.
_HTML = re.compile(rb"\s*<(!doctype|html|head|body|!--|\?xml)", re.IGNORECASE)

_IS_HTML = (
    "The URL returned a web page, not a file. Use the file's download link: on huggingface.co the one with"
    " /resolve/, on civitai.com https://civitai.com/api/download/models/NUMBER."
)

Tick: TypeAlias = Callable[[], None]

_Fetch: TypeAlias = Callable[[BinaryIO, str | None], Fetched | None]
"""Downloads into a file, or returns None if the source still has the given version."""


class Loras:
    """Opens LoRAs: files below `root`, and remote files that `fetcher` may download into `store`.

    `buckets` are the S3 buckets that the operator allows. `max_bytes` limits a remote file. With
    `server_token` the server's own hub token fetches for requests that have none. `hub` is the endpoint of
    the Hugging Face hub (`HF_ENDPOINT`).
    """

    def __init__(
        self,
        root: Path,
        store: LoraStore,
        fetcher: Fetcher,
        *,
        max_bytes: int,
        buckets: Collection[str] = (),
        server_token: bool = False,
        hub: str = constants.ENDPOINT,
    ) -> None:
        self._root = root
        self._store = store
        self.suspects = store.suspects
        self._fetcher = fetcher
        self._buckets = buckets
        self._server_token = server_token
        self._max_bytes = max_bytes
        self._hub = hub
        self._s3 = Buckets()
        self._origin = Meter("origin")

    @classmethod
    def of(cls, settings: RenderSettings, fetcher: Fetcher) -> Self:
        """Return the opener for a node with these settings."""
        return cls(
            settings.loras,
            LoraStore(settings.lora_cache, settings.lora_cache_bytes),
            fetcher,
            max_bytes=settings.max_lora_bytes,
            buckets=settings.fetch_buckets,
            server_token=settings.hub_token_for_requests,
        )

    @contextmanager
    def open(
        self, lora: LoraSpec, *, tick: Tick = lambda: None, token: str | None = None
    ) -> Iterator[LoraFile]:
        """Yield the file of a LoRA. The cache keeps it on disk until the block ends.

        `tick` is called during waits and downloads, and may raise to abort. `token` is for the hub. Raises
        `JobFailure` with the code of the error, and with `retry` if another attempt may succeed.
        """
        lease = None
        with _as_job_failure():
            if isinstance(lora.path, RootFile):
                file = open_lora(self._root, lora.path.path)
            else:
                lease = self._obtain(lora.path, lora.sha256, tick, token)
                file = lease.lora
        try:
            _verify(file.sha256, lora.sha256)
            yield file
        finally:
            if lease:
                lease.close()

    def opens_offline(self, lora: LoraSpec) -> bool:
        """Return whether opening needs no network: the file is below the root, or cached by its sha256."""
        if isinstance(lora.path, RootFile):
            return True
        lease = self._store.find(lora.sha256) if lora.sha256 else None
        if lease:
            lease.close()
        return lease is not None

    def peek(self, remote: RemoteFile, token: str | None = None) -> Header:
        """Return the header of a remote LoRA without downloading its weights. Raises as `open`."""
        with _as_job_failure():
            check(remote, self._fetcher.hosts, self._buckets)
            start, _ = self._read(remote, 0, LENGTH_BYTES, token)
            if start.lstrip().startswith(b"<") and int.from_bytes(start, "little") > MAX_HEADER_BYTES:
                raise JobFailure(FailureCode.LORA_URL_IS_HTML, _IS_HTML)
            length = header_bytes(start)
            text, size = self._read(remote, LENGTH_BYTES, LENGTH_BYTES + length, token)
            return parse_header(text, length, size)

    def _read(self, remote: RemoteFile, start: int, stop: int, token: str | None) -> tuple[bytes, int | None]:
        """Return the bytes from `start` to `stop`, and the file's size if known, as `Fetcher.read` does."""
        if isinstance(remote, BucketFile):
            return self._s3.read(remote, start, stop)
        if isinstance(remote, HubFile):
            url = self._hub_url(remote, remote.revision)
            return self._fetcher.read(url, start, stop, token=self._token(token))
        return self._fetcher.read(remote.url, start, stop)

    def _obtain(self, remote: RemoteFile, expected: str | None, tick: Tick, token: str | None) -> Lease:
        check(remote, self._fetcher.hosts, self._buckets)
        if expected and (lease := self._stored(expected)):
            return lease
        with self._store.flight(unsigned(remote), tick):
            if isinstance(remote, HubFile):
                return self._from_hub(remote, expected, tick, self._token(token))
            get = partial(self._get_object if isinstance(remote, BucketFile) else self._get_url, remote)
            return self._newest(remote, lambda into, version: get(into, version, tick))

    def _token(self, token: str | None) -> str | None:
        """Return the token to send to the hub: the request's, else the server's if requests may use it."""
        return token or (get_token() if self._server_token else None)

    def _newest(self, remote: RemoteFile, fetch: _Fetch) -> Lease:
        """Return the file that the source has now. Downloads it unless the cached version is current."""
        name = unsigned(remote)
        sha256, version = self._store.recall(name) or (None, None)
        with ExitStack() as held, self._store.incoming() as into:
            # Leased before the source is asked, so that the copy cannot be evicted in between.
            cached = self._store.find(sha256) if sha256 else None
            if cached:
                held.callback(cached.close)
            started = time.perf_counter()
            fetched = self._fetch(fetch, into, version if cached else None)
            self._store.meter.looked_up(hit=fetched is None)
            if fetched is not None:
                self._origin.read(fetched.bytes, time.perf_counter() - started)
                into.flush()
                _check_download(Path(into.name))
                lease = self._store.keep(into, fetched.sha256)
                if fetched.etag:
                    self._store.remember(name, fetched.sha256, fetched.etag)
                return lease
            if cached:
                held.pop_all()
                return cached
        raise FetchError(FetchFault.UNREACHABLE, "The source was asked for the file but sent none.")

    def _fetch(self, fetch: _Fetch, into: BinaryIO, version: str | None) -> Fetched | None:
        """Fetch. If the disk is full, evict everything unused and try once more."""
        try:
            return fetch(into, version)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._store.evict():
                raise
        into.seek(0)
        into.truncate()
        return fetch(into, version)

    def _stored(self, sha256: str) -> Lease | None:
        """Return the cached file with this hash, or None. Counts hits of the disk tier only."""
        lease = self._store.find(sha256)
        if lease:
            self._store.meter.looked_up(hit=True)
        return lease

    def _from_hub(self, remote: HubFile, expected: str | None, tick: Tick, token: str | None) -> Lease:
        """Ask the hub for the file's version, the sha256 for large files. Return that version."""
        headers = self._fetcher.head(self._hub_url(remote, remote.revision), token=token, tick=tick)
        etag = headers.get("x-linked-etag") or headers.get("etag", "")
        version = etag.removeprefix("W/").strip('"')
        sha256 = version if _SHA256.fullmatch(version) else None
        if sha256:
            _verify(sha256, expected)
            if lease := self._stored(sha256):
                return lease
        url = self._hub_url(remote, headers.get("x-repo-commit") or remote.revision)

        def fetch(into: BinaryIO, known: str | None) -> Fetched | None:
            if known and known == version:
                return None
            fetched = self._fetcher.fetch(url, into, max_bytes=self._max_bytes, token=token, tick=tick)
            if fetched is None or fetched.sha256 != (sha256 or fetched.sha256):
                raise FetchError(
                    FetchFault.UNREACHABLE, "The file does not match the sha256 that the hub announced."
                )
            return Fetched(fetched.sha256, fetched.bytes, version)

        return self._newest(remote, fetch)

    def _hub_url(self, remote: HubFile, revision: str) -> Url:
        path = f"{remote.repo}/resolve/{quote(revision, safe='')}/{quote(remote.file)}"
        return parse_url(f"{self._hub}/{path}")

    def _get_url(self, remote: WebFile, into: BinaryIO, version: str | None, tick: Tick) -> Fetched | None:
        return self._fetcher.fetch(remote.url, into, max_bytes=self._max_bytes, etag=version, tick=tick)

    def _get_object(
        self, remote: BucketFile, into: BinaryIO, version: str | None, tick: Tick
    ) -> Fetched | None:
        return self._s3.fetch(
            remote, into, max_bytes=self._max_bytes, version=version, pace=self._fetcher.pace(tick)
        )


@contextmanager
def _as_job_failure() -> Iterator[None]:
    """Turn the errors of references, downloads and the disk into `JobFailure`."""
    try:
        yield
    except LoraReferenceError as error:
        raise JobFailure(FailureCode(error.code), str(error)) from error
    except FetchError as error:
        raise JobFailure(
            _CODES[error.fault], f"The LoRA cannot be downloaded. {error}", retry=error.retry
        ) from error
    except OSError as error:
        message = f"The LoRA cache on the node's disk failed: {error.strerror}."
        raise JobFailure(FailureCode.LORA_STORE_ERROR, message, retry=True) from error


def _verify(sha256: str, expected: str | None) -> None:
    if expected and sha256 != expected:
        message = f"The sha256 of the LoRA is {sha256}, not the one in the request."
        raise JobFailure(FailureCode.LORA_HASH_MISMATCH, message)


def _check_download(path: Path) -> None:
    """Refuse a download that is not a LoRA, before it enters the cache."""
    with path.open("rb") as file:
        if _HTML.match(file.read(256)):
            raise JobFailure(FailureCode.LORA_URL_IS_HTML, _IS_HTML)
    judge(read_header(path))
