"""The stable codes of failed jobs, and the error for an unreachable job table."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class FailureCode(StrEnum):
    """Stable codes of failed jobs, in the status as `error_code`."""

    CONTROL_IMAGE_INVALID = "CONTROL_IMAGE_INVALID"
    CONTROL_IMAGE_SHAPE = "CONTROL_IMAGE_SHAPE"
    CONTROL_IMAGE_TOO_LARGE = "CONTROL_IMAGE_TOO_LARGE"
    CONTROL_IMAGE_UNREACHABLE = "CONTROL_IMAGE_UNREACHABLE"
    DEVICE_FAULT = "DEVICE_FAULT"
    INFERENCE_TIMEOUT = "INFERENCE_TIMEOUT"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    LORA_ACCESS_DENIED = "LORA_ACCESS_DENIED"
    LORA_FORMAT_NOT_SUPPORTED = "LORA_FORMAT_NOT_SUPPORTED"
    LORA_HASH_MISMATCH = "LORA_HASH_MISMATCH"
    LORA_NOT_FOUND = "LORA_NOT_FOUND"
    LORA_NO_MATCH = "LORA_NO_MATCH"
    LORA_PATH_NOT_ALLOWED = "LORA_PATH_NOT_ALLOWED"
    LORA_STORE_ERROR = "LORA_STORE_ERROR"
    LORA_TOO_LARGE = "LORA_TOO_LARGE"
    LORA_UNREACHABLE = "LORA_UNREACHABLE"
    LORA_URL_IS_DIRECTORY = "LORA_URL_IS_DIRECTORY"
    LORA_URL_IS_HTML = "LORA_URL_IS_HTML"
    MODEL_LOAD_FAILED = "MODEL_LOAD_FAILED"
    OUTPUT_NOT_FINITE = "OUTPUT_NOT_FINITE"
    OUTPUT_STORE_ERROR = "OUTPUT_STORE_ERROR"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    SECRET_UNREADABLE = "SECRET_UNREADABLE"  # noqa: S105 - a code
    SPEC_UNREADABLE = "SPEC_UNREADABLE"
    URL_NOT_ALLOWED = "URL_NOT_ALLOWED"
    WORKER_LOST = "WORKER_LOST"


class JobFailure(Exception):
    """A job cannot be rendered. `retry` is true if another attempt may help."""

    def __init__(self, code: FailureCode, message: str, *, retry: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry = retry

    def without_frames(self) -> Self:
        """Drop traceback and causes: their frames keep every local alive, such as tensors on a device."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)


class StoreUnavailable(Exception):
    """The job table is unreachable. A write whose reply was lost may be committed, but never in part."""
