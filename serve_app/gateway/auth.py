"""API keys: who may use the service, and who owns a job."""

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
"""Documents in /openapi.json that a key is needed; `KeyedRoute` checks it."""

_ENTRY = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]{1,64}):)?(?P<key>[^\s,:]+)")


class ApiKeys:
    """The keys of this service, held as SHA-256 hashes. The file is read again when it changes."""

    def __init__(self, listed: str, file: Path | None) -> None:
        """Read the entries of `listed`, separated by commas, and those of `file`, one per line.

        An entry is `name:key`, or only a key. Raises `ValueError` if an entry is neither (the message does
        not repeat it) or if there is no key, and `OSError` if the file cannot be read.
        """
        self._listed = _parse(listed.split(","), "API_KEYS")
        self._file = file
        self._stamp = None if file is None else _stamp(file)
        self._filed = {} if file is None else _read(file)
        if not self._listed and not self._filed:
            raise ValueError(
                "API_KEYS and API_KEYS_FILE contain no key; unset both to open the service to all"
            )

    def tenant_of(self, key: str) -> str | None:
        """Return the tenant of `key`, None if the key is unknown."""
        self._refresh()
        digest = _digest(key)
        # Compare all keys in constant time, so that the time reveals nothing about a key.
        tenants = self._listed | self._filed
        found = [tenants[known] for known in tenants if hmac.compare_digest(known, digest)]
        return found[0] if found else None

    def _refresh(self) -> None:
        """Read the file if it has changed. If it cannot be read, the previous keys stay valid."""
        if self._file is None or (stamp := _stamp(self._file)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._filed = _read(self._file)
        except (OSError, ValueError) as error:
            logger.error("API_KEYS_FILE has changed but is invalid; the previous keys stay valid: %s", error)


def open_keys() -> ApiKeys | None:
    """Return the keys from the environment, None if the service is open. Raises as `ApiKeys` does."""
    listed, file = os.environ.get("API_KEYS", ""), os.environ.get("API_KEYS_FILE")
    return ApiKeys(listed, Path(file) if file else None) if listed or file else None


class KeyedRoute(BoundedRoute):
    """A route that needs a key. It refuses a request without one before it reads anything else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, wrapped to put the tenant of the key into the request's state."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            request.state.tenant = _authenticate(request)
            return await handler(request)

        return handle


async def _tenant(request: Request) -> str:
    return request.state.tenant


Tenant = Annotated[str, Depends(_tenant)]
"""The tenant of the request's key, as a parameter of a `KeyedRoute`."""


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
    """Return the tenant by key hash: the name of the key, or the start of the hash if it has none."""
    tenants: dict[bytes, str] = {}
    for number, entry in enumerate(filter(None, map(str.strip, entries)), 1):
        parts = _ENTRY.fullmatch(entry)
        if parts is None or not (entry.isascii() and entry.isprintable()):
            raise ValueError(f"{source}: entry {number} is neither name:key nor a key in printable ASCII")
        digest = _digest(parts["key"])
        tenant = parts["name"] or digest.hex()[:16]
        if tenants.setdefault(digest, tenant) != tenant:
            raise ValueError(f"{source}: the key of entry {number} has another name in an earlier entry")
    return tenants


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Return values that change with the file, None if it does not exist."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
