"""Opens the LoRAs of jobs wherever they are: below the LoRA root, on the web, on the hub, in S3.

What comes from elsewhere is fetched into the node's store, judged there by its header, and leased for the
job. The source is asked each time whether its file is still the one that is here. Imports no torch.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeAlias
from urllib.parse import quote

from botocore.exceptions import BotoCoreError, ClientError
from huggingface_hub import constants, get_token

from cluster.failures import FailureCode, JobFailure
from cluster.metrics import Meter
from cluster.net.fetcher import Fetched, Fetcher, fault_of
from cluster.net.limits import FetchError, FetchFault, copy, too_large
from cluster.net.urls import Url, parse_url
from cluster.objects.s3 import new_client
from deployments.loras.format.header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    header_bytes,
    parse_header,
    read_header,
)
from deployments.loras.format.modules import judge
from deployments.loras.sources.cache import Lease, LoraStore
from deployments.loras.sources.lora_root import LoraFile, open_lora
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

# More than "<": that is also the first byte of a safetensors file whose header has 60 bytes.
_HTML = re.compile(rb"\s*<(!doctype|html|head|body|!--|\?xml)", re.IGNORECASE)

_IS_HTML = (
    "The URL leads to a web page, not to a file. Use the file's own download link: on huggingface.co the one"
    " with /resolve/, on civitai.com https://civitai.com/api/download/models/NUMBER."
)

Tick: TypeAlias = Callable[[], None]

_Fetch: TypeAlias = Callable[[BinaryIO, str | None], Fetched | None]
"""Writes a file, or returns None if its source still has the given version."""


class Loras:
    """The LoRAs that jobs may name: those below `root`, and those that `fetcher` may fetch into `store`.

    `buckets` are those of S3 that the operator lists, `max_bytes` bounds a file from elsewhere, `hub` is the
    endpoint of the Hugging Face hub (`HF_ENDPOINT`).
    """

    def __init__(
        self,
        root: Path,
        store: LoraStore,
        fetcher: Fetcher,
        *,
        max_bytes: int,
        buckets: Collection[str] = (),
        hub: str = constants.ENDPOINT,
    ) -> None:
        self._root = root
        self._store = store
        self.suspects = store.suspects
        self._fetcher = fetcher
        self._buckets = buckets
        self._max_bytes = max_bytes
        self._hub = hub
        self._origin = Meter("origin")

    @classmethod
    def of(cls, settings: RenderSettings, fetcher: Fetcher) -> Self:
        """Return the LoRAs of a node with these settings."""
        return cls(
            settings.loras,
            LoraStore(settings.lora_cache, settings.lora_cache_bytes),
            fetcher,
            max_bytes=settings.max_lora_bytes,
            buckets=settings.fetch_buckets,
        )

    @contextmanager
    def open(
        self, lora: LoraSpec, *, tick: Tick = lambda: None, token: str | None = None
    ) -> Iterator[LoraFile]:
        """Yield the file of a LoRA, which stays on disk until the block ends.

        `tick` is called while bytes come and may raise; `token` is for the hub and wins over the server's.
        Raises `JobFailure` with the code of what is wrong, and `retry` where it may be right another time.
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
        """Return the header of a LoRA from elsewhere; its weights are not fetched. Raises as `open`."""
        with _as_job_failure():
            check(remote, self._fetcher.hosts, self._buckets)
            start, _ = self._read(remote, 0, LENGTH_BYTES, token)
            if start.lstrip().startswith(b"<") and int.from_bytes(start, "little") > MAX_HEADER_BYTES:
                raise JobFailure(FailureCode.LORA_URL_IS_HTML, _IS_HTML)
            length = header_bytes(start)
            text, size = self._read(remote, LENGTH_BYTES, LENGTH_BYTES + length, token)
            return parse_header(text, length, size)

    def _read(self, remote: RemoteFile, start: int, stop: int, token: str | None) -> tuple[bytes, int | None]:
        """Return a part of a file, as `Fetcher.read` does."""
        if isinstance(remote, BucketFile):
            with _s3_faults():
                span = f"bytes={start}-{stop - 1}"
                answer = self._s3.get_object(Bucket=remote.bucket, Key=remote.key, Range=span)
                with closing(answer["Body"]) as body:
                    return body.read(stop - start), int(answer["ContentRange"].rpartition("/")[2])
        if isinstance(remote, HubFile):
            url = self._hub_url(remote, remote.revision)
            return self._fetcher.read(url, start, stop, token=token or get_token())
        return self._fetcher.read(remote.url, start, stop)

    def _obtain(self, remote: RemoteFile, expected: str | None, tick: Tick, token: str | None) -> Lease:
        check(remote, self._fetcher.hosts, self._buckets)
        if expected and (lease := self._stored(expected)):
            return lease
        with self._store.flight(unsigned(remote), tick):
            if isinstance(remote, HubFile):
                return self._from_hub(remote, expected, tick, token or get_token())
            get = partial(self._get_object if isinstance(remote, BucketFile) else self._get_url, remote)
            return self._newest(remote, lambda into, version: get(into, version, tick))

    def _newest(self, remote: RemoteFile, fetch: _Fetch) -> Lease:
        """Return the file as it is at its source now; it is downloaded unless that version is here."""
        name = unsigned(remote)
        sha256, version = self._store.recall(name) or (None, None)
        with ExitStack() as held, self._store.incoming() as into:
            # Held from here on: "unchanged" is worth nothing without the copy.
            copy_here = self._store.find(sha256) if sha256 else None
            if copy_here:
                held.callback(copy_here.close)
            started = time.perf_counter()
            fetched = self._fetch(fetch, into, version if copy_here else None)
            self._store.meter.looked_up(hit=fetched is None)
            if fetched is not None:
                self._origin.read(fetched.bytes, time.perf_counter() - started)
                into.flush()
                _judge(Path(into.name))
                lease = self._store.keep(into, fetched.sha256)
                if fetched.etag:
                    self._store.remember(name, fetched.sha256, fetched.etag)
                return lease
            if copy_here:
                held.pop_all()
                return copy_here
        raise FetchError(FetchFault.UNREACHABLE, "The source sent nothing, though it was asked for the file.")

    def _fetch(self, fetch: _Fetch, into: BinaryIO, version: str | None) -> Fetched | None:
        """Fetch; where the disk is full, once more with all the room that the store can make."""
        try:
            return fetch(into, version)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._store.evict():
                raise
        into.seek(0)
        into.truncate()
        return fetch(into, version)

    def _stored(self, sha256: str) -> Lease | None:
        """Return the node's copy of this content, if there is one; a hit of the disk tier."""
        lease = self._store.find(sha256)
        if lease:
            self._store.meter.looked_up(hit=True)
        return lease

    def _from_hub(self, remote: HubFile, expected: str | None, tick: Tick, token: str | None) -> Lease:
        """Ask the hub for the version of the file, which is its sha256 if it is large; then get that one."""
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
                raise FetchError(FetchFault.UNREACHABLE, "The file is not the one that the hub announced.")
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
        pace = self._fetcher.pace(tick)
        unless = {"IfNoneMatch": version} if version else {}
        with _s3_faults():
            try:
                answer = self._s3.get_object(Bucket=remote.bucket, Key=remote.key, **unless)
            except ClientError as error:
                if _status_of(error) == 304:
                    return None
                raise
            with closing(answer["Body"]) as body:
                if answer["ContentLength"] > self._max_bytes:
                    raise too_large(self._max_bytes)
                sha256, size = copy(pace.over(body.iter_chunks(2**16)), into, self._max_bytes)
        return Fetched(sha256, size, answer["ETag"])

    @cached_property
    def _s3(self) -> Any:  # noqa: ANN401 - boto3 makes its clients' types when they are made
        return new_client()


@contextmanager
def _as_job_failure() -> Iterator[None]:
    """Raise what goes wrong with a reference as a `JobFailure`."""
    try:
        yield
    except LoraReferenceError as error:
        raise JobFailure(FailureCode(error.code), str(error)) from error
    except FetchError as error:
        raise JobFailure(
            _CODES[error.fault], f"The LoRA cannot be fetched. {error}", retry=error.retry
        ) from error
    except OSError as error:
        message = f"The node's store of LoRAs fails: {error.strerror}."
        raise JobFailure(FailureCode.LORA_STORE_ERROR, message, retry=True) from error


@contextmanager
def _s3_faults() -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        status = _status_of(error)
        raise FetchError(fault_of(status), f"S3 answered {status}.") from error
    except BotoCoreError as error:
        raise FetchError(FetchFault.UNREACHABLE, "S3 cannot be reached.") from error


def _status_of(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _verify(sha256: str, expected: str | None) -> None:
    if expected and sha256 != expected:
        message = f"The LoRA has the sha256 {sha256}, not the one of the request."
        raise JobFailure(FailureCode.LORA_HASH_MISMATCH, message)


def _judge(path: Path) -> None:
    """Refuse what is no LoRA before it enters the store."""
    with path.open("rb") as file:
        if _HTML.match(file.read(256)):
            raise JobFailure(FailureCode.LORA_URL_IS_HTML, _IS_HTML)
    judge(read_header(path))
