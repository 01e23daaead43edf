"""Reads a LoRA file's modules from its header: sizes, ranks, and whether each module is complete.

In a file that passes, the tensors of each module belong together. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.loras.format.dialects import Dialect, Role, dialect_of, group
from deployments.loras.format.header import Header, TensorInfo, shorten, unsupported
from deployments.loras.format.layer_names import Shape
from deployments.loras.format.peft_metadata import stated_scales

MAX_GROWN = 2**31
"""How many elements a file's LoKr factors may gain when multiplied out: 8 GiB in float32.

A LoKr of factor 4 for 32 billion weights, the most that a trainer is likely to write, would gain as many.
"""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

Parts = Mapping[Role, TensorInfo]


@dataclass(frozen=True, slots=True)
class Module:
    """One module of a file. It changes `out` outputs of layers whose weights have the shape [*, `inputs`].

    - `rank` is None for a LoKr of two whole factors.
    - `grown` is how many elements its factors gain when multiplied out.
    - `scale` is the one in the metadata. It is None if an alpha tensor gives it (alpha over rank), or if
      nothing does, which means 1.
    """

    parts: Parts
    out: int
    inputs: Shape
    rank: int | None
    grown: int = 0
    scale: float | None = None

    def fits(self, weights: Sequence[Shape]) -> bool:
        """Return whether layers of these weights together have the module's outputs and inputs."""
        return {weight[1:] for weight in weights} == {self.inputs} and self.out == sum(
            weight[0] for weight in weights
        )


@dataclass(frozen=True, slots=True)
class Contents:
    """The modules of a LoRA file, by their names in it."""

    dialect: Dialect
    modules: Mapping[str, Module]


def judge(header: Header) -> Contents:
    """Return a file's modules from its header.

    Raises `JobFailure` (LORA_FORMAT_NOT_SUPPORTED) for a file that no model supports.
    """
    dialect = dialect_of(header)
    found = group(header.tensors)
    scales = stated_scales(header.metadata, found)
    modules = {}
    # Sorted, so that messages do not depend on the order of the file's tensors.
    for stem, parts in sorted(found.items()):
        module = _sized(stem, parts)
        scale = None if Role.ALPHA in parts else scales.of(stem, module.rank)
        modules[stem] = replace(module, scale=scale)
    if sum(module.grown for module in modules.values()) > MAX_GROWN:
        raise unsupported("has LoKr factors that, multiplied out, would be far larger than the file")
    return Contents(dialect, modules)


def _sized(stem: str, parts: Parts) -> Module:
    if not all(tensor.dtype in _FLOATS for tensor in parts.values()):
        raise unsupported(f"has weights that are not floating-point numbers, at {shorten(stem)}")
    if Role.ALPHA in parts and parts[Role.ALPHA].items != 1:
        raise unsupported(f"has an alpha that is not a single number, at {shorten(stem)}")
    return _low_rank(stem, parts) if Role.DOWN in parts or Role.UP in parts else _kronecker(stem, parts)


def _low_rank(stem: str, parts: Parts) -> Module:
    if not {Role.DOWN, Role.UP} <= parts.keys() <= {Role.DOWN, Role.UP, Role.ALPHA}:
        raise unsupported(f"has an incomplete pair of matrices, at {shorten(stem)}")
    down, up = parts[Role.DOWN].shape, parts[Role.UP].shape
    matrices = len(down) in (2, 4) and len(up) == len(down) and set(up[2:]) <= {1}
    if not matrices or down[0] != up[1] or not parts[Role.DOWN].items:
        shapes = f"{list(down)} and {list(up)}"
        raise unsupported(f"has matrices of shapes {shapes}, which do not form a LoRA, at {shorten(stem)}")
    return Module(parts, up[0], down[1:], down[0])


def _kronecker(stem: str, parts: Parts) -> Module:
    (out1, into1), rank1 = _factor(stem, parts, Role.W1, Role.W1_A, Role.W1_B)
    (out2, into2), rank2 = _factor(stem, parts, Role.W2, Role.W2_A, Role.W2_B)
    grown = out1 * into1 + out2 * into2 - sum(tensor.items for tensor in parts.values())
    return Module(parts, out1 * out2, (into1 * into2,), rank2 or rank1, max(grown, 0))


def _factor(stem: str, parts: Parts, whole: Role, left: Role, right: Role) -> tuple[Shape, int | None]:
    if whole in parts:
        shape, rank = parts[whole].shape, None
    elif {left, right} <= parts.keys() and parts[left].shape[1:] == parts[right].shape[:1]:
        shape, rank = parts[left].shape[:1] + parts[right].shape[1:], parts[right].shape[0]
    else:
        raise unsupported(f"has an incomplete LoKr factor, at {shorten(stem)}")
    if len(shape) != 2 or 0 in shape or rank == 0:
        raise unsupported(
            f"has a LoKr factor of shape {list(shape)}, which is not usable, at {shorten(stem)}"
        )
    return shape, rank
