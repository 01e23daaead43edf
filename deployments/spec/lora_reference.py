"""References to LoRAs: paths below the LoRA root, web URLs, files on the Hugging Face hub, objects in S3.

A reference is parsed once, without network access, and is passed on parsed. Imports no torch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self, TypeAlias
from urllib.parse import unquote

from pydantic import PlainSerializer, PlainValidator

from cluster.net.urls import Url, UrlRefused, check_url, parse_url

SUFFIX = ".safetensors"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30})://(.*)", re.DOTALL)

_HUB = ("huggingface.co", "www.huggingface.co", "hf.co")

_HUB_LINK = re.compile(r"/(datasets/|spaces/)?([^/]+/[^/]+)/(blob|resolve|raw|tree)/([^/]+)(?:/(.*))?")

_HUB_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

_BUCKET = re.compile(r"([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.+)")

_OTHER_KIND = re.compile(
    r".*\.(7z|bin|ckpt|gguf|gz|html?|jpe?g|json|onnx|pickle|pkl|png|pth?|rar|tar|txt|zip)", re.IGNORECASE
)


_SIGNATURE = re.compile(
    r"(x-(amz|goog)-[^=]*|awsaccesskeyid|googleaccessid|key-pair-id|policy|signature|expires)(=.*)?",
    re.IGNORECASE,
)
"""Query parameters that sign a URL: S3 and R2 (AWS Signature 2 and 4), Google Cloud Storage, CloudFront."""


class LoraReferenceError(Exception):
    """A LoRA path cannot be used. `code` is the stable code on the wire, the message is a sentence."""

    code: ClassVar[str]


class LoraNotSafetensors(LoraReferenceError):
    """The path is neither a regular `.safetensors` file nor a PEFT folder."""

    code = "LORA_FORMAT_NOT_SUPPORTED"


class UrlNotAllowed(LoraReferenceError):
    """The service never fetches from the URL. The message repeats no part of it."""

    code = "URL_NOT_ALLOWED"


class LoraUrlIsDirectory(LoraReferenceError):
    """The URL is a page of the hub that lists files, not a file."""

    code = "LORA_URL_IS_DIRECTORY"


class _Reference(ABC):
    """Base class of references."""

    __slots__ = ()

    @property
    @abstractmethod
    def text(self) -> str:
        """The canonical text of the reference, including secrets in its query."""

    @property
    def query(self) -> str:
        """The query of a URL with its "?". It may hold secrets. Empty for other references."""
        return ""

    @property
    def public(self) -> str:
        """The text without the query."""
        return self.text

    def with_query(self, query: str) -> Self:
        """Return the reference with another query, in the form of `query`. Only URLs change."""
        return self


@dataclass(frozen=True, slots=True)
class RootFile(_Reference):
    """A path as the client sent it. `lora_root.resolve` finds its file below the LoRA root or refuses it."""

    path: str

    @property
    def text(self) -> str:
        """The path."""
        return self.path


@dataclass(frozen=True, slots=True)
class WebFile(_Reference):
    """A file at an http(s) URL."""

    url: Url

    @property
    def text(self) -> str:
        """The whole URL, including secrets in its query."""
        return self.url.full

    @property
    def query(self) -> str:
        """The query with its "?". Presigned URLs carry their signature there."""
        return f"?{self.url.query}" if self.url.query else ""

    @property
    def public(self) -> str:
        """The URL without its query."""
        return str(self.url)

    def with_query(self, query: str) -> WebFile:
        """Return the same URL with another query."""
        return WebFile(replace(self.url, query=query.removeprefix("?")))


@dataclass(frozen=True, slots=True)
class HubFile(_Reference):
    """A file in a model repository of the Hugging Face hub, at a branch, tag or commit."""

    repo: str
    file: str
    revision: str

    @property
    def text(self) -> str:
        """The reference as `hf://ORG/REPO/FILE@REVISION`."""
        return f"hf://{self.repo}/{self.file}@{self.revision}"


@dataclass(frozen=True, slots=True)
class BucketFile(_Reference):
    """An object in S3."""

    bucket: str
    key: str

    @property
    def text(self) -> str:
        """The reference as `s3://BUCKET/KEY`."""
        return f"s3://{self.bucket}/{self.key}"


RemoteFile: TypeAlias = WebFile | HubFile | BucketFile

LoraReference: TypeAlias = RootFile | RemoteFile


def parse(text: str) -> LoraReference:
    """Parse a reference. Text without a scheme is a path below the LoRA root.

    Links to files on huggingface.co become `hf://` references. Raises `UrlNotAllowed`, `LoraUrlIsDirectory`,
    or `LoraNotSafetensors` if the file's name ends like another kind of file.
    """
    parts = _SCHEME.fullmatch(text)
    if parts is None:
        return RootFile(text)
    scheme, rest = parts[1].lower(), parts[2]
    if scheme == "hf":
        path, _, revision = rest.rpartition("@") if "@" in rest else (rest, "", "main")
        repo, file = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
        return _hub_file(repo, file, revision)
    if scheme == "s3":
        return _bucket_file(rest)
    try:
        url = parse_url(text)
    except UrlRefused as error:
        raise UrlNotAllowed(f"{error} For LoRAs, hf:// and s3:// references work too.") from error
    if url.host in _HUB:
        return _hub_link(url)
    if _OTHER_KIND.fullmatch(url.path):
        raise _not_safetensors()
    return WebFile(url)


def _read(value: str | LoraReference) -> LoraReference:
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except LoraReferenceError as error:
        raise ValueError(str(error)) from error


StoredReference = Annotated[
    LoraReference, PlainValidator(_read), PlainSerializer(lambda reference: reference.text, return_type=str)
]
"""A reference in a pydantic model: text in JSON, parsed in memory."""


def unsigned(file: RemoteFile) -> str:
    """Return the text of a reference without a presigned URL's signature, which changes for the same file."""
    if not isinstance(file, WebFile):
        return file.text
    parts = [part for part in file.url.query.split("&") if not _SIGNATURE.fullmatch(part)]
    return replace(file.url, query="&".join(parts)).full


def check(file: LoraReference, hosts: Collection[str], buckets: Collection[str]) -> None:
    """Raise `UrlNotAllowed` for a bucket not in `buckets`, or a host neither public nor in `hosts`.

    Names are not resolved here, so this cannot find a public name with a private address.
    """
    if isinstance(file, BucketFile) and file.bucket not in buckets:
        raise UrlNotAllowed(
            "This service does not read from that S3 bucket. Its operator can add it to FETCH_ALLOW_BUCKETS."
        )
    if isinstance(file, WebFile):
        try:
            check_url(file.url, hosts)
        except UrlRefused as error:
            raise UrlNotAllowed(str(error)) from error


def _hub_link(url: Url) -> RemoteFile:
    """Parse a link copied from the hub's pages. The query (`?download=true`) is ignored."""
    parts = _HUB_LINK.fullmatch(url.path)
    if parts is None:
        # At most ORG/REPO: the front page, a user or a repository. Longer paths may be downloads of an API.
        if url.path.count("/") <= 2:
            raise _directory()
        return WebFile(url)
    kind, repo, view, revision, file = parts.groups()
    if view == "tree" or not file:
        raise _directory()
    if kind:
        return WebFile(parse_url(f"https://{_HUB[0]}/{kind}{repo}/resolve/{revision}/{file}"))
    return _hub_file(unquote(repo), unquote(file), unquote(revision))


def _hub_file(repo: str, file: str, revision: str) -> HubFile:
    segments = [*file.split("/"), *revision.split("/")]
    clean = all(segment not in ("", ".", "..") and segment.isprintable() for segment in segments)
    if not _HUB_REPO.fullmatch(repo) or not clean:
        raise UrlNotAllowed("Write a file on the Hugging Face hub as hf://ORG/REPO/FILE@REVISION.")
    if not file.lower().endswith(SUFFIX):
        raise _not_safetensors()
    return HubFile(repo, file, revision)


def _bucket_file(text: str) -> BucketFile:
    parts = _BUCKET.fullmatch(text)
    if parts is None:
        raise UrlNotAllowed("Write an object in S3 as s3://BUCKET/KEY.")
    if not parts[2].lower().endswith(SUFFIX):
        raise _not_safetensors()
    return BucketFile(parts[1], parts[2])


def _directory() -> LoraUrlIsDirectory:
    return LoraUrlIsDirectory("The URL is a folder. Open the page of the file in it and copy that link.")


def _not_safetensors() -> LoraNotSafetensors:
    return LoraNotSafetensors(f"The LoRA must be a {SUFFIX} file.")
