"""What an adapter adds to one layer's output, by kind: low rank (LoRA) and Kronecker product (LoKr)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from deployments.loras.dialects import Role
from deployments.loras.header import shorten, unsupported

Layer: TypeAlias = torch.nn.Linear | torch.nn.Conv2d


class Delta(Protocol):
    """An addition to a layer, linear in the layer's input."""

    @property
    def scale(self) -> float:
        """The factor of the file's own alpha; the multiplier of a job comes on top."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Delta:
        """Return a copy on a device, in a dtype."""
        ...

    def fits(self, layers: Sequence[Layer]) -> bool:
        """Whether the addition has the layers' input size, and output sizes put together."""
        ...

    def split(self, sizes: Sequence[int]) -> Sequence[Delta]:
        """Cut the output into one delta for each of `sizes`, which add up to its own size."""
        ...

    def formed(self, *, in_file_dtype: bool) -> Delta:
        """Return it as a merge by hand forms it, in the dtype of the file, or exact."""
        ...

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the unscaled addition for the layer's input `x`, in the dtype of the weights."""
        ...


@dataclass(frozen=True, slots=True)
class LowRank:
    """`up @ down`: down [rank, in], up [out, rank]; for convolutions [rank, in, h, w], [out, rank, 1, 1].

    Formed in the file's dtype, the product for a linear layer is rounded to that, as a merge would do it.
    """

    down: Tensor
    up: Tensor
    scale: float
    file_dtype: torch.dtype
    in_file_dtype: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights."""
        return self.down, self.up

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """Return a copy on a device, in a dtype."""
        return replace(self, down=self.down.to(device, dtype), up=self.up.to(device, dtype))

    def fits(self, layers: Sequence[Layer]) -> bool:
        """Whether the addition has the layers' input size, and output sizes put together."""
        out, inputs = _sizes(layers)
        kernel = self.up.shape[2:]
        return inputs == {tuple(self.down.shape[1:])} and self.up.shape[0] == out and kernel.numel() == 1

    def split(self, sizes: Sequence[int]) -> Sequence[LowRank]:
        """Cut the output into one delta for each of `sizes`, which add up to its own size."""
        return [replace(self, up=up) for up in self.up.split(list(sizes))]

    def formed(self, *, in_file_dtype: bool) -> LowRank:
        """Return it as a merge by hand forms it, in the dtype of the file, or exact."""
        return replace(self, in_file_dtype=in_file_dtype)

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the unscaled addition for the layer's input `x`, in the dtype of the weights."""
        x = x.to(self.down.dtype)
        if isinstance(layer, torch.nn.Conv2d):
            inner = functional.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
            return functional.conv2d(inner, self.up)
        if self.in_file_dtype:
            product = self.up.to(self.file_dtype) @ self.down.to(self.file_dtype)
            return functional.linear(x, product.to(x.dtype))
        return functional.linear(functional.linear(x, self.down), self.up)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """`kron(w1, w2)`: w1 [o1, i1], w2 [o2, i2] for a linear layer of o1*o2 outputs and i1*i2 inputs.

    A layer that has but a part of the outputs has those from `start` to `stop`.
    """

    w1: Tensor
    w2: Tensor
    scale: float
    start: int = 0
    stop: int | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights."""
        return self.w1, self.w2

    def to(self, device: torch.device, dtype: torch.dtype) -> Kronecker:
        """Return a copy on a device, in a dtype."""
        return replace(self, w1=self.w1.to(device, dtype), w2=self.w2.to(device, dtype))

    def fits(self, layers: Sequence[Layer]) -> bool:
        """Whether the addition has the layers' input size, and output sizes put together."""
        out, into = (a * b for a, b in zip(self.w1.shape, self.w2.shape, strict=True))
        return _sizes(layers) == (out, {(into,)})

    def split(self, sizes: Sequence[int]) -> Sequence[Kronecker]:
        """Cut the output into one delta for each of `sizes`, which add up to its own size."""
        block = self.w2.shape[0]  # The outputs of one row of w1.
        pieces = []
        for size, stop in zip(sizes, accumulate(sizes), strict=True):
            first, skipped = divmod(stop - size, block)
            w1 = self.w1[first : math.ceil(stop / block)]
            pieces.append(replace(self, w1=w1, start=skipped, stop=skipped + size))
        return pieces

    def formed(self, *, in_file_dtype: bool) -> Kronecker:
        """Return it as it is: nobody merges these by hand."""
        return self

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the unscaled addition for the layer's input `x`, in the dtype of the weights.

        `kron(w1, w2) @ vec(X) = vec(w1 @ X @ w2.T)` with X [i1, i2], without the product ever being built.
        """
        blocks = x.to(self.w1.dtype).unflatten(-1, (self.w1.shape[1], self.w2.shape[1]))
        return (self.w1 @ functional.linear(blocks, self.w2)).flatten(-2)[..., self.start : self.stop]


def _sizes(layers: Sequence[Layer]) -> tuple[int, set[tuple[int, ...]]]:
    """Return the layers' output sizes put together, and the different shapes of their inputs."""
    return sum(layer.weight.shape[0] for layer in layers), {tuple(layer.weight.shape[1:]) for layer in layers}


def build(stem: str, parts: Mapping[Role, Tensor]) -> Delta:
    """Make the delta of one module from its tensors.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for tensors that do not belong together, or of rank 0.
    """
    if not all(tensor.is_floating_point() for tensor in parts.values()):
        raise unsupported(f"has weights that are no floating-point numbers, at {shorten(stem)}")
    return _low_rank(stem, parts) if Role.DOWN in parts or Role.UP in parts else _kronecker(stem, parts)


def _low_rank(stem: str, parts: Mapping[Role, Tensor]) -> LowRank:
    if not {Role.DOWN, Role.UP} <= parts.keys() <= {Role.DOWN, Role.UP, Role.ALPHA}:
        raise unsupported(f"has an incomplete pair of matrices at {shorten(stem)}")
    down, up = parts[Role.DOWN], parts[Role.UP]
    if down.dim() not in (2, 4) or up.dim() != down.dim() or down.shape[0] != up.shape[1] or not down.numel():
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise unsupported(f"has matrices of shapes {shapes} at {shorten(stem)}, which make no LoRA")
    return LowRank(down, up, _scale(stem, parts, rank=down.shape[0]), file_dtype=up.dtype)


def _kronecker(stem: str, parts: Mapping[Role, Tensor]) -> Kronecker:
    w1, rank1 = _factor(stem, parts, Role.W1, Role.W1_A, Role.W1_B)
    w2, rank2 = _factor(stem, parts, Role.W2, Role.W2_A, Role.W2_B)
    rank = rank2 or rank1
    # With two whole factors there is no rank; the trainer then writes a dummy alpha (1e10, inf in float16).
    return Kronecker(w1, w2, _scale(stem, parts, rank) if rank else 1.0)


def _factor(
    stem: str, parts: Mapping[Role, Tensor], whole: Role, left: Role, right: Role
) -> tuple[Tensor, int | None]:
    if whole in parts:
        factor, rank = parts[whole], None
    elif {left, right} <= parts.keys() and parts[left].shape[1:] == parts[right].shape[:1]:
        factor, rank = parts[left].float() @ parts[right].float(), parts[right].shape[0]
    else:
        raise unsupported(f"has an incomplete LoKr factor at {shorten(stem)}")
    if factor.dim() != 2 or not factor.numel() or rank == 0:
        raise unsupported(f"has a LoKr factor of shape {list(factor.shape)} at {shorten(stem)}")
    return factor, rank


def _scale(stem: str, parts: Mapping[Role, Tensor], rank: int) -> float:
    """Alpha over rank; files without alpha mean 1."""
    alpha = parts.get(Role.ALPHA)
    if alpha is None:
        return 1.0
    if alpha.numel() != 1 or not alpha.isfinite():
        raise unsupported(f"has an alpha that is no number at {shorten(stem)}")
    return alpha.item() / rank
