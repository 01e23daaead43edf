"""Downloads LoRAs from S3 buckets. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from typing import Any, BinaryIO

from botocore.exceptions import BotoCoreError, ClientError

from cluster.net.fetcher import Fetched, fault_of
from cluster.net.limits import FetchError, FetchFault, Pace, copy, too_large
from cluster.objects.s3 import new_client
from deployments.spec.lora_reference import BucketFile


class Buckets:
    """S3, by boto3's own chain of credentials. Every method raises `FetchError` if S3 fails."""

    def read(self, file: BucketFile, start: int, stop: int) -> tuple[bytes, int]:
        """Return the bytes from `start` to `stop`, and the size of the whole object."""
        with _s3_faults():
            span = f"bytes={start}-{stop - 1}"
            response = self._client.get_object(Bucket=file.bucket, Key=file.key, Range=span)
            with closing(response["Body"]) as body:
                return body.read(stop - start), int(response["ContentRange"].rpartition("/")[2])

    def fetch(
        self, file: BucketFile, into: BinaryIO, *, max_bytes: int, version: str | None, pace: Pace
    ) -> Fetched | None:
        """Download an object into `into`; return None if `version` is still its ETag.

        `pace` bounds the download's time and rate.
        """
        unless = {"IfNoneMatch": version} if version else {}
        with _s3_faults():
            try:
                response = self._client.get_object(Bucket=file.bucket, Key=file.key, **unless)
            except ClientError as error:
                if _status_of(error) == 304:
                    return None
                raise
            with closing(response["Body"]) as body:
                if response["ContentLength"] > max_bytes:
                    raise too_large(max_bytes)
                sha256, size = copy(pace.over(body.iter_chunks(2**16)), into, max_bytes)
        return Fetched(sha256, size, response["ETag"])

    @cached_property
    def _client(self) -> Any:  # noqa: ANN401 - boto3 creates its clients' classes at run time
        return new_client()


@contextmanager
def _s3_faults() -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        status = _status_of(error)
        raise FetchError(fault_of(status), f"S3 returned status {status}.") from error
    except BotoCoreError as error:
        raise FetchError(FetchFault.UNREACHABLE, "S3 is unreachable.") from error


def _status_of(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]
