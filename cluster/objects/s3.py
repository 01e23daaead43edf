"""The object store in an S3 bucket, at AWS or any S3-compatible server.

Credentials come from boto3's credential chain (environment, files, container and instance roles). Endpoint
and region come from the usual `AWS_*` variables. The URL holds everything else.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import parse_qsl

from boto3.s3.transfer import TransferConfig, create_transfer_manager
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import RetriesExceededError

from cluster.objects.store import KEY, StoreError, check_key
from cluster.telemetry import redact

PART_BYTES = 8 * 2**20
"""Larger objects are transferred in parts of this size. A retry repeats one part, not the whole object."""

MAX_EXPIRY_S = 7 * 24 * 3600
"""Maximum lifetime of a presigned URL in S3."""

CONNECT_S = 5.0
"""Connect timeout: a reachable store connects at once. Also limits each write of a request's body."""

READ_S = 30.0
"""Read timeout. Completing a multipart upload can take a store several seconds."""

ATTEMPTS = 4
"""With back-off of up to 1, 2 and 4 s. If the store never answers, a request fails after two minutes, well
below the stall limit of a job that publishes."""

_TRANSFER = TransferConfig(
    multipart_threshold=PART_BYTES,
    multipart_chunksize=PART_BYTES,
    max_concurrency=4,
    # The CRT client would ignore these limits and the timeouts.
    preferred_transfer_client="classic",
)

_URL = re.compile(rf"s3://([a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9])(?:/({KEY.pattern}))?/?(?:\?([^?#]*))?")

_OPTIONS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "sse": (re.compile(r"AES256|aws:kms(:dsse)?"), "AES256, aws:kms or aws:kms:dsse"),
    "kms_key_id": (re.compile(r"[\w:/-]{1,2048}", re.ASCII), "the id, alias or ARN of a KMS key"),
    "storage_class": (
        re.compile(r"(?!(GLACIER|DEEP_ARCHIVE)$)[A-Z][A-Z0-9_]{0,63}"),
        "a class whose objects can be read at once",
    ),
    "addressing": (re.compile(r"path|virtual"), "path or virtual"),
    "expires_s": (re.compile(r"[1-9][0-9]{0,5}"), f"1 to {MAX_EXPIRY_S} seconds"),
}


@dataclass(frozen=True, slots=True)
class S3Url:
    """A parsed `s3://BUCKET/PREFIX?OPTIONS`: where objects are stored, and how they are uploaded and served.

    `prefix` is empty or ends with a slash. `upload` holds the arguments of every upload except its type.
    """

    bucket: str
    prefix: str
    upload: Mapping[str, str]
    addressing: str | None
    expires_s: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse a URL. Raises `ValueError`, without repeating it, for bad syntax or unknown options."""
        match = _URL.fullmatch(url)
        if match is None:
            raise ValueError(
                "an S3 store is s3://BUCKET/PREFIX?OPTION=VALUE; credentials do not belong in the URL"
            )
        bucket, prefix, query = match.groups()
        options = _options(query)
        if "kms_key_id" in options and not options.get("sse", "").startswith("aws:kms"):
            raise ValueError("kms_key_id needs sse=aws:kms or sse=aws:kms:dsse")
        arguments = {
            "ServerSideEncryption": options.get("sse"),
            "SSEKMSKeyId": options.get("kms_key_id"),
            "StorageClass": options.get("storage_class"),
        }
        return cls(
            bucket=bucket,
            prefix=f"{prefix}/" if prefix else "",
            upload={name: value for name, value in arguments.items() if value is not None},
            addressing=options.get("addressing"),
            expires_s=int(options.get("expires_s", "3600")),
        )


def _options(query: str | None) -> dict[str, str]:
    if query is None:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        # The original error repeats the URL's text.
        raise ValueError("write the options of an S3 store as NAME=VALUE, joined by &") from None
    options = dict(pairs)
    if len(options) < len(pairs) or not options.keys() <= _OPTIONS.keys():
        raise ValueError(f"an S3 store accepts the options {', '.join(_OPTIONS)}, each at most once")
    for name, value in options.items():
        pattern, meaning = _OPTIONS[name]
        if not pattern.fullmatch(value) or (name == "expires_s" and int(value) > MAX_EXPIRY_S):
            raise ValueError(f"{name} of an S3 store must be {meaning}")
    return options


class S3Store:
    """Stores objects below a prefix of one bucket, for processes on any number of machines."""

    def __init__(self, url: str) -> None:
        """Create the client without contacting the store. Raises `ValueError` as `S3Url.parse` does."""
        self._place = S3Url.parse(url)
        with _faults("the S3 client cannot be set up"):
            self._client = new_client(self._place.addressing)

    def put(self, key: str, data: bytes, content_type: str) -> None:  # noqa: D102
        self._upload(key, io.BytesIO(data), content_type)

    def put_file(self, key: str, path: Path, content_type: str) -> None:  # noqa: D102
        self._upload(key, str(path), content_type)

    def get(self, key: str) -> bytes:  # noqa: D102
        name, data = self._name(key), io.BytesIO()
        with _faults(f"{key} cannot be read"), create_transfer_manager(self._client, _TRANSFER) as manager:
            manager.download(self._place.bucket, name, data).result()
        return data.getvalue()

    def exists(self, key: str) -> bool:  # noqa: D102
        name = self._name(key)
        with _faults(f"{key} cannot be looked up"):
            try:
                self._client.head_object(Bucket=self._place.bucket, Key=name)
            except ClientError as error:
                if error.response["Error"]["Code"] == "404":
                    return False
                raise
        return True

    def location(self, key: str) -> str:  # noqa: D102
        return f"s3://{self._place.bucket}/{self._name(key)}"

    def url(self, key: str, base_url: str) -> str:  # noqa: D102
        parameters = {"Bucket": self._place.bucket, "Key": self._name(key)}
        with _faults(f"no URL can be signed for {key}"):
            return self._client.generate_presigned_url(
                "get_object", Params=parameters, ExpiresIn=self._place.expires_s
            )

    def local_path(self, key: str) -> Path | None:  # noqa: D102
        return None

    def delete(self, prefix: str) -> None:  # noqa: D102
        bucket, name = self._place.bucket, self._name(prefix)
        left: list[dict[str, str]] = []
        with _faults(f"{prefix} cannot be removed"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=name)
            # A page holds up to 1000 names, the maximum of one delete request.
            for page in pages:
                found = [item["Key"] for item in page.get("Contents", ())]
                if doomed := [{"Key": key} for key in found if key == name or key.startswith(f"{name}/")]:
                    request = {"Objects": doomed, "Quiet": True}
                    left += self._client.delete_objects(Bucket=bucket, Delete=request).get("Errors", [])
        if left:
            code = redact(str(left[0].get("Code")))
            raise StoreError(
                f"{prefix} cannot be removed: the store refused to delete {len(left)} objects with {code}"
            )

    def _upload(self, key: str, source: BinaryIO | str, content_type: str) -> None:
        name = self._name(key)
        arguments = {**self._place.upload, "ContentType": content_type}
        with _faults(f"{key} cannot be stored"), create_transfer_manager(self._client, _TRANSFER) as manager:
            manager.upload(source, self._place.bucket, name, arguments).result()

    def _name(self, key: str) -> str:
        check_key(key)
        return f"{self._place.prefix}{key}"


def new_client(addressing: str | None = None) -> Any:  # noqa: ANN401 - botocore makes the class when it runs
    """Return an S3 client with our timeouts and number of attempts. Clients are thread-safe.

    `addressing` is `path`, `virtual`, or None to choose by the endpoint. Raises `BotoCoreError`.
    """
    own_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        # Otherwise some regions get signatures of version 2, which do not work for encrypted objects.
        signature_version="s3v4",
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        # Otherwise botocore crashes on a 5xx with a checksum instead of retrying.
        response_checksum_validation="when_required",
        # By default botocore signs URLs for AWS's global host, which redirects those of other regions to a
        # host that the signature does not cover.
        s3={"addressing_style": addressing or ("path" if own_endpoint else "virtual")},
    )
    # A new session, because boto3's default session is not thread-safe. Sessions read AWS_DEFAULT_REGION, but
    # not AWS_REGION, which other SDKs and AWS's containers use.
    return Session(region_name=os.environ.get("AWS_REGION") or None).client("s3", config=config)


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Turn the client's errors into `StoreError`. Of a response, only the code is safe to show."""
    try:
        yield
    except ClientError as error:
        code = redact(str(error.response["Error"].get("Code")))
        raise StoreError(f"{what}: {error.operation_name} was refused with {code}") from error
    except (BotoCoreError, RetriesExceededError, OSError) as error:
        raise StoreError(f"{what}: {redact(str(error))}") from error
