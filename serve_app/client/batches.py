"""Typed answers of the batch routes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from serve_app.client.answers import Answer, Output, Result, Time


class Counts(Answer):
    """How many requests of a batch are in each state."""

    in_queue: int
    in_progress: int
    succeeded: int
    failed: int
    canceled: int

    @property
    def total(self) -> int:
        """Number of requests in the batch."""
        return self.ended + self.in_queue + self.in_progress

    @property
    def ended(self) -> int:
        """Number of requests that have ended."""
        return self.succeeded + self.failed + self.canceled


class AskedLora(Answer):
    """A LoRA of a request."""

    path: str
    network_multiplier: float
    transformer: str | None


class AskedPrompt(Answer):
    """A prompt of a request, with its defaults filled in."""

    prompt: str
    seed: int
    width: int
    height: int


class BatchResult(Result):
    """A request of a batch, with its result."""

    error_code: str | None
    started_at: Time | None
    attempts: int
    loras: tuple[AskedLora, ...]
    prompts: tuple[AskedPrompt, ...]

    @property
    def files(self) -> Sequence[Output | None]:
        """The output of each prompt, None if it has none."""
        return self.outputs.files if self.outputs else [None] * len(self.prompts)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per prompt. `waited_s` and `ran_s` are seconds in the queue and on a worker."""
        return [
            {
                "request_id": self.request_id,
                "status": self.status.value,
                "model": self.metadata.model,
                "lora": " + ".join(lora.path for lora in self.loras) or None,
                "multiplier": self._multiplier,
                "prompt": prompt.prompt,
                "seed": prompt.seed,
                "width": output.width if output else prompt.width,
                "height": output.height if output else prompt.height,
                "url": output.url if output else None,
                "manifest_url": output.manifest_url if output else None,
                "error_code": self.error_code,
                "error": self.error,
                "attempts": self.attempts,
                "waited_s": _seconds(self.created_at, self.started_at),
                "ran_s": _seconds(self.started_at, self.finished_at),
                "inference_s": self.metadata.inference_time,
            }
            for prompt, output in zip(self.prompts, self.files, strict=True)
        ]

    def label(self, index: int) -> tuple[str, str, str]:
        """Return three caption lines of a prompt's picture: prompt, LoRAs with multiplier, seed."""
        stems = " + ".join(PurePosixPath(lora.path).stem for lora in self.loras)
        prompt = self.prompts[index]
        return prompt.prompt, f"{stems or 'no LoRA'} x {self._multiplier}", f"seed {prompt.seed}"

    @property
    def _multiplier(self) -> float | None:
        """The multiplier that all LoRAs share; None without LoRAs, or if they differ."""
        multipliers = {lora.network_multiplier for lora in self.loras}
        return multipliers.pop() if len(multipliers) == 1 else None


def _seconds(begin: Time | None, end: Time | None) -> float | None:
    return None if begin is None or end is None else (end - begin).total_seconds()
