"""The object store in an S3 bucket: of AWS, or of any server that speaks its protocol.

Credentials come from boto3's own chain (environment, files, container and instance roles), endpoint and
region from the usual `AWS_*` variables; the URL says the rest.
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
"""Larger objects travel in parts of this size: a part that fails is sent again, not the whole."""

MAX_EXPIRY_S = 7 * 24 * 3600
"""The longest life that S3 gives a presigned URL."""

CONNECT_S = 5.0
"""A store within reach answers at once. The limit also holds for each piece of a body that is sent."""

READ_S = 30.0
"""Wait for an answer: the end of a multipart upload takes a store seconds."""

ATTEMPTS = 4
"""With back-off of up to 1, 2 and 4 s. A store that never answers costs two minutes a request, well below the
limit at which a job that publishes counts as stalled."""

_TRANSFER = TransferConfig(
    multipart_threshold=PART_BYTES,
    multipart_chunksize=PART_BYTES,
    max_concurrency=4,
    # The other client would keep neither to these limits nor to the time-outs.
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
    """What `s3://BUCKET/PREFIX?OPTIONS` says: where objects go, and how they are kept and handed out.

    `prefix` is empty or ends with a slash; `upload` are the arguments of every upload beside its type.
    """

    bucket: str
    prefix: str
    upload: Mapping[str, str]
    addressing: str | None
    expires_s: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a URL; raises `ValueError`, without repeating it, for anything that is not known."""
        match = _URL.fullmatch(url)
        if match is None:
            raise ValueError("an S3 store is s3://BUCKET/PREFIX?OPTION=VALUE; keys never stand in the URL")
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
        # The original repeats what it could not read.
        raise ValueError("the options of an S3 store are NAME=VALUE, joined by &") from None
    options = dict(pairs)
    if len(options) < len(pairs) or not options.keys() <= _OPTIONS.keys():
        raise ValueError(f"the options of an S3 store are {', '.join(_OPTIONS)}, each at most once")
    for name, value in options.items():
        pattern, meaning = _OPTIONS[name]
        if not pattern.fullmatch(value) or (name == "expires_s" and int(value) > MAX_EXPIRY_S):
            raise ValueError(f"{name} of an S3 store must be {meaning}")
    return options


class S3Store:
    """Objects below a prefix of one bucket, for the processes of any number of machines."""

    def __init__(self, url: str) -> None:
        """Make the client; nothing is asked of the store yet. Raises `ValueError` as `S3Url.parse` does."""
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
            # A page holds up to 1000 names, as many as one request may delete.
            for page in pages:
                found = [item["Key"] for item in page.get("Contents", ())]
                if doomed := [{"Key": key} for key in found if key == name or key.startswith(f"{name}/")]:
                    request = {"Objects": doomed, "Quiet": True}
                    left += self._client.delete_objects(Bucket=bucket, Delete=request).get("Errors", [])
        if left:
            code = redact(str(left[0].get("Code")))
            raise StoreError(f"{prefix} cannot be removed: {len(left)} objects were refused with {code}")

    def _upload(self, key: str, source: BinaryIO | str, content_type: str) -> None:
        name = self._name(key)
        arguments = {**self._place.upload, "ContentType": content_type}
        with _faults(f"{key} cannot be stored"), create_transfer_manager(self._client, _TRANSFER) as manager:
            manager.upload(source, self._place.bucket, name, arguments).result()

    def _name(self, key: str) -> str:
        check_key(key)
        return f"{self._place.prefix}{key}"


def new_client(addressing: str | None = None) -> Any:  # noqa: ANN401 - botocore makes the class when it runs
    """Return a client of S3 with our time-outs and attempts, for any number of threads.

    `addressing` is `path`, `virtual`, or what suits the endpoint. Raises `BotoCoreError`.
    """
    own_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        # Without it some regions get URLs of the old kind, which encrypted objects refuse.
        signature_version="s3v4",
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        # Else botocore breaks on a 5xx that comes with a checksum, instead of asking again.
        response_checksum_validation="when_required",
        # Left to itself, botocore signs URLs for AWS's global host, which redirects those of other regions to
        # a host that they are not signed for.
        s3={"addressing_style": addressing or ("path" if own_endpoint else "virtual")},
    )
    # A session of its own: boto3's default one is not safe to share between threads. It reads
    # AWS_DEFAULT_REGION by itself, but not the name that the other SDKs and AWS's containers use.
    return Session(region_name=os.environ.get("AWS_REGION") or None).client("s3", config=config)


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Turn the client's errors into `StoreError`; of an answer only its code is told, texts may hold more."""
    try:
        yield
    except ClientError as error:
        code = redact(str(error.response["Error"].get("Code")))
        raise StoreError(f"{what}: {error.operation_name} was refused with {code}") from error
    except (BotoCoreError, RetriesExceededError, OSError) as error:
        raise StoreError(f"{what}: {redact(str(error))}") from error
