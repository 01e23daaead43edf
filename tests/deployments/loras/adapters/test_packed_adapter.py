"""Adapters packed into one buffer: values, dtypes, alignment, and that a copy shares no memory."""

from __future__ import annotations

import torch

from deployments.loras.adapters.layer_deltas import Kronecker, LowRank
from deployments.loras.adapters.packed_adapter import pack

CPU = torch.device("cpu")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_copy_has_the_values_in_each_layer_s_dtype() -> None:
    low = LowRank(noise(3, 5), noise(7, 3).half(), 0.5, torch.float16)
    convolution = LowRank(noise(2, 3, 3, 3), noise(4, 2, 1, 1), 2.0, torch.float32)
    kronecker = Kronecker(noise(3, 1), noise(1, 5), 1.0, start=1, stop=2)
    deltas = {("t", "a"): low, ("t", "b"): convolution, ("e", "c"): kronecker}
    dtypes = {("t", "a"): torch.bfloat16, ("t", "b"): torch.float32, ("e", "c"): torch.float16}
    packed = pack(deltas, dtypes, "left out", pinned=False)
    copy = packed.copy(CPU)
    packed.buffer.zero_()
    assert copy.warning == "left out"
    for name, delta in copy.deltas.items():
        for tensor, original in zip(delta.tensors, deltas[name].tensors, strict=True):
            assert torch.equal(tensor, original.to(dtypes[name]))
            assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
            assert tensor.untyped_storage().data_ptr() == copy.buffer.data_ptr()
        assert delta.replaced(deltas[name].tensors) == deltas[name]


def test_what_several_layers_share_is_stored_once() -> None:
    whole = LowRank(noise(16, 64), noise(48, 16), 1.0, torch.float32)
    deltas = {("t", str(index)): piece for index, piece in enumerate(whole.split([16, 16, 16]))}
    packed = pack(deltas, dict.fromkeys(deltas, torch.float32), pinned=False)
    assert packed.bytes == 4 * (16 * 64 + 48 * 16)
    copied = torch.cat([delta.tensors[1] for delta in packed.copy(CPU).deltas.values()])
    assert torch.equal(copied, whole.up)


def test_a_large_copy_has_memory_of_its_own() -> None:
    large = LowRank(noise(64, 16384), noise(48, 64), 1.0, torch.float32)
    packed = pack({("t", "a"): large}, {("t", "a"): torch.float32}, pinned=False)
    copies = [packed.copy(CPU) for _ in range(2)]
    copies[0].buffer.zero_()
    assert torch.equal(copies[1].deltas["t", "a"].tensors[0], large.down)
    assert packed.buffer.count_nonzero() > 0
