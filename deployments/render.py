"""What a job asks for, fully resolved: the JSON that admission writes into the job table and workers read."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

ImageFormat = Literal["jpeg", "png", "webp"]


class LoraSpec(BaseModel):
    """One LoRA of a job: a path below the LoRA root, and the weight it is applied with (-2..2)."""

    model_config = ConfigDict(frozen=True)

    path: str
    multiplier: float = 1.0
    transformer: Literal["low", "high"] | None = None


class PromptSpec(BaseModel):
    """One picture of a job, every default resolved; `controls` are object store keys of control images.

    Width and height are pixels, already floored to the model's divisor; `seed` is in [0, 2**64).
    """

    model_config = ConfigDict(frozen=True)

    prompt: str
    neg: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    controls: tuple[str, ...] = ()


class RenderSpec(BaseModel):
    """A whole job: one model, its LoRAs, and one or more prompts that run one after another."""

    model_config = ConfigDict(frozen=True)

    model: str
    loras: tuple[LoraSpec, ...]
    prompts: tuple[PromptSpec, ...]
    output_format: ImageFormat = "jpeg"
    warnings: tuple[str, ...] = ()

    @property
    def adapter(self) -> str:
        """The identity of the job's LoRA set, multipliers left out: they change for free."""
        return "|".join(f"{lora.transformer or ''}:{lora.path}" for lora in self.loras)
