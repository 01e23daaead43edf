"""References to LoRAs elsewhere: web URLs, files on the Hugging Face hub, objects in S3.

Nothing here goes to the network: the gateway reads references with it. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeAlias
from urllib.parse import unquote

from cluster.net.urls import Url, UrlRefused, check_url, parse_url
from deployments.loras.sources.lora_root import SUFFIX, LoraNotSafetensors, LoraReferenceError

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


class UrlNotAllowed(LoraReferenceError):
    """A URL that this service does not fetch, whatever is there. The text repeats nothing of it."""

    code = "URL_NOT_ALLOWED"


class LoraUrlIsDirectory(LoraReferenceError):
    """A link to a page of the hub that lists files."""

    code = "LORA_URL_IS_DIRECTORY"


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file at an http(s) URL."""

    url: Url

    @property
    def text(self) -> str:
        """The reference in its one form, secrets of the query included."""
        return self.url.full


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file in a model repository of the Hugging Face hub, at a branch, tag or commit."""

    repo: str
    file: str
    revision: str

    @property
    def text(self) -> str:
        """The reference in its one form."""
        return f"hf://{self.repo}/{self.file}@{self.revision}"


@dataclass(frozen=True, slots=True)
class BucketFile:
    """An object in S3."""

    bucket: str
    key: str

    @property
    def text(self) -> str:
        """The reference in its one form."""
        return f"s3://{self.bucket}/{self.key}"


RemoteFile: TypeAlias = WebFile | HubFile | BucketFile


def parse(reference: str) -> RemoteFile | None:
    """Read a reference; none for a path, which `references.resolve` judges.

    Links to files on huggingface.co are read as `hf://` references. Raises `UrlNotAllowed`,
    `LoraUrlIsDirectory`, and `LoraNotSafetensors` where the name shows another kind of file.
    """
    parts = _SCHEME.fullmatch(reference)
    if parts is None:
        return None
    scheme, rest = parts[1].lower(), parts[2]
    if scheme == "hf":
        path, _, revision = rest.rpartition("@") if "@" in rest else (rest, "", "main")
        repo, file = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
        return _hub_file(repo, file, revision)
    if scheme == "s3":
        return _bucket_file(rest)
    try:
        url = parse_url(reference)
    except UrlRefused as error:
        raise UrlNotAllowed(f"{error} LoRAs also come from hf:// and s3:// references.") from error
    if url.host in _HUB:
        return _hub_link(url)
    if _OTHER_KIND.fullmatch(url.path):
        raise _not_safetensors()
    return WebFile(url)


def unsigned(file: RemoteFile) -> str:
    """Return the reference without what signs a presigned URL: that changes, the file does not."""
    if not isinstance(file, WebFile):
        return file.text
    parts = [part for part in file.url.query.split("&") if not _SIGNATURE.fullmatch(part)]
    return replace(file.url, query="&".join(parts)).full


def check(file: RemoteFile, hosts: Collection[str], buckets: Collection[str]) -> None:
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
