"""The versions of the packages that decide a picture, for its manifest."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("lora-serve", "torch", "diffusers", "transformers")


def package_versions() -> dict[str, str]:
    """Return the version of each package by its name; "not installed" for one that runs from a checkout."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
