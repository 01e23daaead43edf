"""`POST /v1/loras/inspect` and `lora-serve inspect`: what a LoRA is, from its header."""

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
"""A header is at most 10 MB, and somebody waits for it."""


class Inspector:
    """Inspects LoRAs as requests name them. Blocking; for any number of threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def inspect(self, reference: str, token: str | None = None) -> Inspection:
        """Tell what the LoRA at `reference` is; of one from elsewhere only the header is fetched.

        `token` is for the hub and wins over the server's own. Raises `Refusal`.
        """
        with refused_lora(reference):
            parsed = parse(reference)
            if isinstance(parsed, RootFile):
                return inspect_file(resolve(self._settings.loras, parsed.path))
            return inspect(self._loras.peek(parsed, token))

    @cached_property
    def _loras(self) -> Loras:
        from deployments.loras.sources.loras import Loras  # It needs boto3.

        return Loras.of(self._settings, Fetcher(parse_hosts(self._settings.fetch_hosts), _LIMITS))
