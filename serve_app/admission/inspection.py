"""Reports what a LoRA is from its header, for `POST /v1/loras/inspect` and `lora-serve inspect`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from cluster.net.fetcher import Fetcher
from cluster.net.limits import Limits
from cluster.net.urls import parse_hosts
from deployments.loras.format.inspection import Inspection, inspect, inspect_file
from deployments.loras.sources.lora_root import resolve
from deployments.spec.lora_reference import RootFile, parse
from serve_app.admission.lora_rules import refused_lora
from serve_app.settings import Settings

if TYPE_CHECKING:
    from deployments.loras.sources.loras import Loras

_LIMITS = Limits(total_s=20.0, grace_s=10.0)
"""A header has at most 10 MB, and a client is waiting for it."""


class Inspector:
    """Inspects LoRAs, named as in requests. Blocking; thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def inspect(self, reference: str, token: str | None = None) -> Inspection:
        """Return what the LoRA at `reference` is. For a remote LoRA, only the header is fetched.

        `token` is a Hugging Face token; it overrides the server's own. Raises `Refusal`.
        """
        with refused_lora(reference):
            parsed = parse(reference)
            if isinstance(parsed, RootFile):
                return inspect_file(resolve(self._settings.loras, parsed.path))
            return inspect(self._loras.peek(parsed, token))

    @cached_property
    def _loras(self) -> Loras:
        from deployments.loras.sources.loras import Loras  # Imported here because it needs boto3.

        return Loras.of(self._settings, Fetcher(parse_hosts(self._settings.fetch_hosts), _LIMITS))
