"""References to LoRAs: paths below the LoRA root, web URLs, files on the Hugging Face hub, objects in S3.

A reference is parsed once, without network, and then travels parsed. Imports no torch.
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
"""Parts of a query that sign it: of S3 and R2 (AWS's Signature 2 and 4), Google Cloud Storage, CloudFront."""


class LoraReferenceError(Exception):
    """A LoRA path that cannot be used; `code` is the stable code on the wire, the text a sentence."""

    code: ClassVar[str]


class LoraNotSafetensors(LoraReferenceError):
    """The path is neither a regular `.safetensors` file nor a PEFT folder."""

    code = "LORA_FORMAT_NOT_SUPPORTED"


class UrlNotAllowed(LoraReferenceError):
    """A URL that this service does not fetch, whatever is there. The text repeats nothing of it."""

    code = "URL_NOT_ALLOWED"


class LoraUrlIsDirectory(LoraReferenceError):
    """A link to a page of the hub that lists files."""

    code = "LORA_URL_IS_DIRECTORY"


class _Reference(ABC):
    """What all references have."""

    __slots__ = ()

    @property
    @abstractmethod
    def text(self) -> str:
        """The reference in its one form, secrets of a query included."""

    @property
    def query(self) -> str:
        """The query of a URL with its "?", which may hold secrets; empty for everything else."""
        return ""

    @property
    def public(self) -> str:
        """The text without the query."""
        return self.text

    def with_query(self, query: str) -> Self:
        """Return the reference with another query, as `query` has it; only URLs have one."""
        return self


@dataclass(frozen=True, slots=True)
class RootFile(_Reference):
    """A path as the client sent it; `lora_root.resolve` finds its file below the LoRA root, or refuses it."""

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
        """The reference in its one form, secrets of the query included."""
        return self.url.full

    @property
    def query(self) -> str:
        """The query with its "?"; presigned URLs carry their signature there."""
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
        """The reference in its one form."""
        return f"hf://{self.repo}/{self.file}@{self.revision}"


@dataclass(frozen=True, slots=True)
class BucketFile(_Reference):
    """An object in S3."""

    bucket: str
    key: str

    @property
    def text(self) -> str:
        """The reference in its one form."""
        return f"s3://{self.bucket}/{self.key}"


RemoteFile: TypeAlias = WebFile | HubFile | BucketFile

LoraReference: TypeAlias = RootFile | RemoteFile


def parse(text: str) -> LoraReference:
    """Read a reference; text without a scheme is a path below the LoRA root.

    Links to files on huggingface.co are read as `hf://` references. Raises `UrlNotAllowed`,
    `LoraUrlIsDirectory`, and `LoraNotSafetensors` where the name shows another kind of file.
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
        raise UrlNotAllowed(f"{error} LoRAs also come from hf:// and s3:// references.") from error
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
"""A reference in a pydantic model: its text in JSON, parsed in memory."""


def unsigned(file: RemoteFile) -> str:
    """Return the reference without what signs a presigned URL: that changes, the file does not."""
    if not isinstance(file, WebFile):
        return file.text
    parts = [part for part in file.url.query.split("&") if not _SIGNATURE.fullmatch(part)]
    return replace(file.url, query="&".join(parts)).full


def check(file: LoraReference, hosts: Collection[str], buckets: Collection[str]) -> None:
    """Raise `UrlNotAllowed` for a host that shows to be private, or a bucket; unless it is listed."""
    if isinstance(file, BucketFile) and file.bucket not in buckets:
        raise UrlNotAllowed("This service does not read from that bucket.")
    if isinstance(file, WebFile):
        try:
            check_url(file.url, hosts)
        except UrlRefused as error:
            raise UrlNotAllowed(str(error)) from error


def _hub_link(url: Url) -> RemoteFile:
    """Read a link to the hub as its pages have it; its query (`?download=true`) means nothing."""
    parts = _HUB_LINK.fullmatch(url.path)
    if parts is None:
        # Not a repository of a user: the front page, a user's page, or an API.
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
        raise UrlNotAllowed("A file on the hub is named hf://ORG/REPO/FILE@REVISION.")
    if not file.lower().endswith(SUFFIX):
        raise _not_safetensors()
    return HubFile(repo, file, revision)


def _bucket_file(text: str) -> BucketFile:
    parts = _BUCKET.fullmatch(text)
    if parts is None:
        raise UrlNotAllowed("An object in S3 is named s3://BUCKET/KEY.")
    if not parts[2].lower().endswith(SUFFIX):
        raise _not_safetensors()
    return BucketFile(parts[1], parts[2])


def _directory() -> LoraUrlIsDirectory:
    return LoraUrlIsDirectory("The URL names a folder: open the file's own page and take its link.")


def _not_safetensors() -> LoraNotSafetensors:
    return LoraNotSafetensors(f"The LoRA must be a {SUFFIX} file.")
