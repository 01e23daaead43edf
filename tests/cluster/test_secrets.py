"""Secrets at rest: sealing, opening, and the errors of wrong keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.failures import FailureCode, JobFailure
from cluster.secrets import can_seal, open_secret, seal

KEY = "an operator's own phrase of 40 characters"

TOKEN = "hf_Sg7secretSg7secret"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", KEY)


def test_what_is_sealed_is_opened_again_and_is_not_in_clear() -> None:
    values = {"hf_token": TOKEN, "urls": {"0": "https://host/a?sig=ü"}}
    sealed = seal(values)
    assert open_secret(sealed) == values
    assert sealed.isascii() and TOKEN not in sealed
    assert seal(values) != sealed, "equal secrets must not look equal"


@pytest.mark.parametrize("other", [None, "", "short", KEY.upper()], ids=repr)
def test_another_key_fails_the_job_with_a_code_and_without_the_secret(
    monkeypatch: pytest.MonkeyPatch, other: str | None
) -> None:
    sealed = seal({"hf_token": TOKEN})
    if other is None:
        monkeypatch.delenv("SECRET_KEY")
    else:
        monkeypatch.setenv("SECRET_KEY", other)
    with pytest.raises(JobFailure) as raised:
        open_secret(sealed)
    failure = raised.value
    assert (failure.code, failure.retry) == (FailureCode.SECRET_UNREADABLE, False)
    assert failure.__suppress_context__
    assert not any(text in failure.message for text in (TOKEN, sealed, KEY, KEY.upper()))


@pytest.mark.parametrize("change", [lambda s: s[:-4], lambda s: "x" + s, lambda s: "", lambda s: "ü" + s])
def test_a_damaged_ciphertext_is_no_secret(change: Callable[[str], str]) -> None:
    with pytest.raises(JobFailure):
        open_secret(change(seal({"hf_token": TOKEN})))


@pytest.mark.parametrize(("value", "can"), [(None, False), ("", False), ("x" * 32, True), (KEY, True)])
def test_whether_secrets_are_taken(monkeypatch: pytest.MonkeyPatch, value: str | None, can: bool) -> None:
    monkeypatch.delenv("SECRET_KEY")
    if value is not None:
        monkeypatch.setenv("SECRET_KEY", value)
    assert can_seal() is can
    if not can:
        with pytest.raises(ValueError, match="SECRET_KEY is not set"):
            seal({})


def test_a_short_key_is_refused_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x" * 31)
    for refuses in (can_seal, lambda: seal({})):
        with pytest.raises(ValueError, match="at least 32 characters") as raised:
            refuses()
        assert "xxx" not in str(raised.value)
