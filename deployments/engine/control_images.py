"""Opens the control images of jobs, from the object store or from the web."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable

from PIL import Image

from cluster.failures import FailureCode, JobFailure
from cluster.net.fetcher import Fetcher
from cluster.net.limits import FetchError, FetchFault
from cluster.net.urls import parse_url
from cluster.objects.store import ObjectStore, StoreError
from deployments.engine.media import ImageRejected, ImageTooLarge, decode_control

logger = logging.getLogger(__name__)

MAX_CONTROL_BYTES = 64 * 2**20
"""Largest control image that is fetched: 64 MiB, the default limit of a request body."""

_CODES = {
    FetchFault.NOT_ALLOWED: FailureCode.URL_NOT_ALLOWED,
    FetchFault.TOO_LARGE: FailureCode.CONTROL_IMAGE_TOO_LARGE,
}


class Controls:
    """Opens the entries of a prompt's `controls`: keys of `store`, or URLs that `fetcher` may fetch."""

    def __init__(self, store: ObjectStore, fetcher: Fetcher, max_pixels: int) -> None:
        """Limit images from the web to `max_pixels`. The gateway has checked those in the store."""
        self._store = store
        self._fetcher = fetcher
        self._max_pixels = max_pixels

    def open(self, reference: str, tick: Callable[[], None]) -> Image.Image:
        """Return the image in RGB. `tick` is called during the download and may raise to end it.

        Raises `JobFailure` (CONTROL_IMAGE_INVALID, CONTROL_IMAGE_TOO_LARGE, CONTROL_IMAGE_UNREACHABLE,
        URL_NOT_ALLOWED, OUTPUT_STORE_ERROR).
        """
        try:
            if reference.startswith("http"):
                return decode_control(self._fetch(reference, tick), self._max_pixels)
            return decode_control(self._store.get(reference), max_pixels=Image.MAX_IMAGE_PIXELS or 0)
        except ImageTooLarge as error:
            raise JobFailure(FailureCode.CONTROL_IMAGE_TOO_LARGE, str(error)) from error
        except ImageRejected as error:
            raise JobFailure(FailureCode.CONTROL_IMAGE_INVALID, str(error)) from error
        except StoreError as error:
            logger.warning("a control image could not be read: %s", error)
            message = "a control image could not be read from the object store"
            raise JobFailure(FailureCode.OUTPUT_STORE_ERROR, message, retry=True) from error

    def _fetch(self, reference: str, tick: Callable[[], None]) -> bytes:
        buffer = io.BytesIO()
        try:
            self._fetcher.fetch(parse_url(reference), buffer, max_bytes=MAX_CONTROL_BYTES, tick=tick)
        except FetchError as error:
            code = _CODES.get(error.fault, FailureCode.CONTROL_IMAGE_UNREACHABLE)
            message = f"The control image cannot be fetched. {error}"
            raise JobFailure(code, message, retry=error.retry) from error
        return buffer.getvalue()
