"""Encrypts a request's secrets for storage, as a JSON object. The key is in the environment only."""

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
"""Minimum length of `SECRET_KEY`. There is no key stretching, so it must be long and random."""


def can_seal() -> bool:
    """Return whether `SECRET_KEY` is set. Raises `ValueError` if it is too short."""
    return _secret_key() is not None


def seal(values: Mapping[str, Any]) -> str:
    """Encrypt a JSON object as ASCII text. Raises `ValueError` if `SECRET_KEY` is not set or too short."""
    return _fernet().encrypt(json.dumps(values).encode()).decode()


def open_secret(ciphertext: str) -> dict[str, Any]:
    """Decrypt what `seal` returned.

    Raises `JobFailure` if `SECRET_KEY` is not set, is too short, or differs from the key used by `seal`. The
    error contains no part of the secret.
    """
    try:
        return json.loads(_fernet().decrypt(ciphertext))
    except (InvalidToken, ValueError):
        message = f"the request's secrets cannot be decrypted: worker and gateway need the same {VARIABLE}"
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
