"""Secrets of a request at rest: a JSON object, encrypted with a key that only the environment holds."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cluster.failures import FailureCode, JobFailure

VARIABLE = "SECRET_KEY"

MIN_CHARS = 32
"""Shortest `SECRET_KEY`: it is stretched by nothing, so it has to be long and random."""


def can_seal() -> bool:
    """Return whether there is a `SECRET_KEY`; raises `ValueError` for one that is too short."""
    return _secret_key() is not None


def seal(values: Mapping[str, Any]) -> str:
    """Return a JSON object encrypted, as ASCII text; raises `ValueError` without a good `SECRET_KEY`."""
    return _fernet().encrypt(json.dumps(values).encode()).decode()


def open_secret(ciphertext: str) -> dict[str, Any]:
    """Return what `seal` was given.

    Raises `JobFailure` where `SECRET_KEY` is absent, too short, or not the one that sealed; it holds nothing
    of the secret.
    """
    try:
        return json.loads(_fernet().decrypt(ciphertext))
    except (InvalidToken, ValueError):
        message = f"the request's secrets cannot be read: the worker's {VARIABLE} is not that of the gateway"
        raise JobFailure(FailureCode.SECRET_UNREADABLE, message) from None


def _fernet() -> Fernet:
    secret_key = _secret_key()
    if secret_key is None:
        raise ValueError(f"{VARIABLE} is not set")
    derived = HKDF(SHA256(), length=32, salt=None, info=b"lora-serve secrets").derive(secret_key.encode())
    return Fernet(base64.urlsafe_b64encode(derived))


def _secret_key() -> str | None:
    value = os.environ.get(VARIABLE)
    if value and len(value) < MIN_CHARS:
        raise ValueError(f"{VARIABLE} must have at least {MIN_CHARS} characters")
    return value or None
