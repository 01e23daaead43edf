"""API keys: who may use the service, and whose job is whose."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param

from cluster.jobs.model import OPEN_TENANT
from serve_app.gateway.body_bounds import BoundedRoute
from serve_app.wire.refusals import Code, Refusal

logger = logging.getLogger(__name__)

SCHEME = HTTPBearer(auto_error=False, scheme_name="API key")
"""Tells in the OpenAPI description that a key is needed; `KeyedRoute` asks for it."""

_ENTRY = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]{1,64}):)?(?P<key>[^\s,:]+)")


class ApiKeys:
    """The keys of this service, held as sha256; those in the file are read again when it changes."""

    def __init__(self, listed: str, file: Path | None) -> None:
        """Take `listed` entries, separated by commas, and those in `file`, one per line.

        An entry is `name:key`, or a key alone. Raises `ValueError` where an entry is neither or there is
        none at all, without repeating it, and `OSError` where the file cannot be read.
        """
        self._listed = _parse(listed.split(","), "API_KEYS")
        self._file = file
        self._stamp = None if file is None else _stamp(file)
        self._filed = {} if file is None else _read(file)
        if not self._listed and not self._filed:
            raise ValueError("API_KEYS holds no key; unset it to open the service to everybody")

    def tenant_of(self, key: str) -> str | None:
        """Return the owner that `key` stands for, None for an unknown key."""
        self._refresh()
        digest = _digest(key)
        # All are compared, in constant time, so that the time taken tells nothing about a key.
        tenants = self._listed | self._filed
        found = [tenants[known] for known in tenants if hmac.compare_digest(known, digest)]
        return found[0] if found else None

    def _refresh(self) -> None:
        """Read the file if it has changed; one that cannot be read leaves the keys as they were."""
        if self._file is None or (stamp := _stamp(self._file)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._filed = _read(self._file)
        except (OSError, ValueError) as error:
            logger.error("API_KEYS_FILE has changed and is of no use; the keys before stay: %s", error)


def open_keys() -> ApiKeys | None:
    """Return the keys that the environment names, None where the service is open; raises as `ApiKeys`."""
    listed, file = os.environ.get("API_KEYS", ""), os.environ.get("API_KEYS_FILE")
    return ApiKeys(listed, Path(file) if file else None) if listed or file else None


class KeyedRoute(BoundedRoute):
    """A route for holders of a key: without one a request is refused before anything else is read of it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, called with the owner of the key in the request's state."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            request.state.tenant = _authenticate(request)
            return await handler(request)

        return handle


async def _tenant(request: Request) -> str:
    return request.state.tenant


Tenant = Annotated[str, Depends(_tenant)]
"""The owner of the request's key, in a `KeyedRoute`."""


def _authenticate(request: Request) -> str:
    keys: ApiKeys | None = request.app.state.keys
    if keys is None:
        return OPEN_TENANT
    scheme, key = get_authorization_scheme_param(request.headers.get("Authorization"))
    tenant = keys.tenant_of(key) if scheme.lower() == "bearer" else None
    if tenant is None:
        raise Refusal(Code.API_KEY_REQUIRED)
    return tenant


def _read(file: Path) -> dict[bytes, str]:
    lines = file.read_text(encoding="ascii").splitlines()
    return _parse((line for line in lines if not line.startswith("#")), "API_KEYS_FILE")


def _parse(entries: Iterable[str], source: str) -> dict[bytes, str]:
    """Return the owner by the hash of each key: its name, else a part of that hash."""
    tenants: dict[bytes, str] = {}
    for number, entry in enumerate(filter(None, map(str.strip, entries)), 1):
        parts = _ENTRY.fullmatch(entry)
        if parts is None or not (entry.isascii() and entry.isprintable()):
            raise ValueError(f"{source}: entry {number} is neither name:key nor a key in printable ASCII")
        digest = _digest(parts["key"])
        tenant = parts["name"] or digest.hex()[:16]
        if tenants.setdefault(digest, tenant) != tenant:
            raise ValueError(f"{source}: the key of entry {number} has another name before")
    return tenants


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Return what changes with the file, None while it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
