"""What an adapter adds to a layer's output: a low-rank product (LoRA) or a Kronecker product (LoKr)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from deployments.loras.format.dialects import Role
from deployments.loras.format.file_modules import Module
from deployments.loras.format.header import unsupported

Layer: TypeAlias = torch.nn.Linear | torch.nn.Conv2d


class Delta(Protocol):
    """An addition to a layer's output, linear in the layer's input."""

    @property
    def scale(self) -> float:
        """The scale from the file's alpha. Callers pass it times the job's multiplier as `factor`."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights."""
        ...

    def replaced(self, tensors: Sequence[Tensor]) -> Delta:
        """Return the delta with other weights, of the same order and shapes as `tensors`."""
        ...

    def split(self, sizes: Sequence[int]) -> Sequence[Delta]:
        """Cut the output into one delta for each of `sizes`, which must add up to its size."""
        ...

    def swap(self) -> Delta:
        """Exchange the two halves of the output."""
        ...

    def __call__(self, layer: Layer, x: Tensor, factor: float, *, in_file_dtype: bool = False) -> Tensor:
        """Return `factor` times the addition for the layer's input `x`, in the dtype of the weights.

        With `in_file_dtype` the product of two matrices and the factor is computed in the file's dtype, as in
        a manual merge.
        """
        ...

    def weight(self, factor: float, *, in_file_dtype: bool = False) -> Tensor:
        """Return `factor` times the addition to the layer's weight, in float32; `in_file_dtype` as above."""
        ...


@dataclass(frozen=True, slots=True)
class LowRank:
    """`up @ down`: down [rank, in], up [out, rank]; for convolutions [rank, in, h, w], [out, rank, 1, 1].

    With `in_file_dtype` a linear layer's product is rounded to the file's dtype, and again after it is
    multiplied by the factor, as in a merge.
    """

    down: Tensor
    up: Tensor
    scale: float
    file_dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights."""
        return self.down, self.up

    def replaced(self, tensors: Sequence[Tensor]) -> LowRank:
        """Return the delta with other weights, of the same order and shapes as `tensors`."""
        down, up = tensors
        return LowRank(down, up, self.scale, self.file_dtype)

    def split(self, sizes: Sequence[int]) -> Sequence[LowRank]:
        """Cut the output into one delta for each of `sizes`, which must add up to its size."""
        return [replace(self, up=up) for up in self.up.split(list(sizes))]

    def swap(self) -> LowRank:
        """Exchange the two halves of the output."""
        return replace(self, up=self.up.roll(self.up.shape[0] // 2, 0))

    def __call__(self, layer: Layer, x: Tensor, factor: float, *, in_file_dtype: bool = False) -> Tensor:
        """Return `factor` times the addition for the layer's input `x`, in the dtype of the weights."""
        x = x.to(self.down.dtype)
        if isinstance(layer, torch.nn.Conv2d):
            inner = functional.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
            return functional.conv2d(inner, self.up) * factor
        # If `x` is no wider than the file's dtype, the product has no more precision than that anyway.
        if in_file_dtype and self.file_dtype.itemsize < x.dtype.itemsize:
            return functional.linear(x, self.weight(factor, in_file_dtype=True).to(x.dtype))
        return functional.linear(functional.linear(x, self.down), self.up) * factor

    def weight(self, factor: float, *, in_file_dtype: bool = False) -> Tensor:
        """Return `factor` times the addition to the layer's weight, in float32."""
        return (self._product(self.file_dtype if in_file_dtype else torch.float32) * factor).float()

    def _product(self, dtype: torch.dtype) -> Tensor:
        """Return `up @ down` in the shape of the layer's weight, computed in `dtype`."""
        product = self.up.flatten(1).to(dtype) @ self.down.flatten(1).to(dtype)
        return product.unflatten(1, self.down.shape[1:])


@dataclass(frozen=True, slots=True)
class Kronecker:
    """`kron(w1, w2)`: w1 [o1, i1], w2 [o2, i2] for a linear layer of o1*o2 outputs and i1*i2 inputs.

    A delta for a part of the outputs has those from `start` to `stop`.
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

    def replaced(self, tensors: Sequence[Tensor]) -> Kronecker:
        """Return the delta with other weights, of the same order and shapes as `tensors`."""
        w1, w2 = tensors
        return Kronecker(w1, w2, self.scale, self.start, self.stop)

    def split(self, sizes: Sequence[int]) -> Sequence[Kronecker]:
        """Cut the output into one delta for each of `sizes`, which must add up to its size."""
        block = self.w2.shape[0]  # The outputs of one row of w1.
        pieces = []
        for size, stop in zip(sizes, accumulate(sizes), strict=True):
            first, skipped = divmod(stop - size, block)
            w1 = self.w1[first : math.ceil(stop / block)]
            pieces.append(replace(self, w1=w1, start=skipped, stop=skipped + size))
        return pieces

    def swap(self) -> Kronecker:
        """Exchange the two halves of the output. Raises `JobFailure` if a row of w1 belongs to both."""
        if self.w1.shape[0] % 2:
            raise unsupported("has LoKr factors that cannot be divided into the two halves of a layer")
        return replace(self, w1=self.w1.roll(self.w1.shape[0] // 2, 0))

    def __call__(self, layer: Layer, x: Tensor, factor: float, *, in_file_dtype: bool = False) -> Tensor:
        """Return `factor` times the addition for the layer's input `x`, in the dtype of the weights.

        `in_file_dtype` has no effect: nobody merges a LoKr by hand, so there is no rounding to reproduce.
        The product is never built, because `kron(w1, w2) @ vec(X) = vec(w1 @ X @ w2.T)` with X [i1, i2].
        """
        blocks = x.to(self.w1.dtype).unflatten(-1, (self.w1.shape[1], self.w2.shape[1]))
        added = (self.w1 @ functional.linear(blocks, self.w2)).flatten(-2)[..., self.start : self.stop]
        return added * factor

    def weight(self, factor: float, *, in_file_dtype: bool = False) -> Tensor:
        """Return `factor` times the addition to the layer's weight, in float32."""
        return torch.kron(self.w1.float(), self.w2.float())[self.start : self.stop] * factor


def build(module: Module, tensors: Mapping[Role, Tensor]) -> Delta:
    """Build the delta of a module from its tensors. Its header must have been checked.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for an alpha that is not finite.
    """
    if Role.DOWN in tensors:
        down, up = tensors[Role.DOWN], tensors[Role.UP]
        return LowRank(down, up, _scale(module, tensors), file_dtype=up.dtype)
    w1 = _factor(tensors, Role.W1, Role.W1_A, Role.W1_B)
    w2 = _factor(tensors, Role.W2, Role.W2_A, Role.W2_B)
    return Kronecker(w1, w2, _scale(module, tensors))


def _factor(tensors: Mapping[Role, Tensor], whole: Role, left: Role, right: Role) -> Tensor:
    return tensors[whole] if whole in tensors else tensors[left].float() @ tensors[right].float()


def _scale(module: Module, tensors: Mapping[Role, Tensor]) -> float:
    """Return alpha over rank, else the scale in the metadata, else 1."""
    if Role.ALPHA not in tensors:
        return 1.0 if module.scale is None else module.scale
    if module.rank is None:
        # For two whole LoKr factors the trainer writes a dummy alpha (1e10, inf in float16).
        return 1.0
    alpha = tensors[Role.ALPHA]
    if not alpha.isfinite():
        raise unsupported("has an alpha that is infinite or NaN")
    return alpha.item() / module.rank
