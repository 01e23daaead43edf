"""Copies to a GPU while it computes: the same bytes, within the memory bound, freed unless taken."""

from __future__ import annotations

import pytest
import torch

from deployments.loras.adapters.device_staging import Staging
from deployments.loras.adapters.layer_deltas import LowRank
from deployments.loras.adapters.packed_adapter import Packed, pack

KEY = ("a" * 64, None)

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def adapter(*, pinned: bool) -> Packed:
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(8, 512, generator=generator), torch.randn(512, 8, generator=generator)
    name = ("transformer", "layer")
    return pack({name: LowRank(down, up, 1.0, torch.float32)}, {name: torch.float32}, pinned=pinned)


def test_a_cpu_has_nothing_to_hide() -> None:
    staging, packed = Staging(torch.device("cpu")), adapter(pinned=False)
    with staging.hold(KEY, packed, room=2**30):
        assert staging.take(KEY) is None


@on_a_gpu
def test_a_copy_is_taken_once_and_outlives_its_block() -> None:
    staging, packed = Staging(torch.device("cuda")), adapter(pinned=True)
    with staging.hold(KEY, packed, room=packed.bytes):
        taken = staging.take(KEY)
        assert staging.take(KEY) is None
    assert taken is not None
    assert torch.equal(taken.buffer.cpu(), packed.buffer)
    assert all(tensor.is_cuda for delta in taken.deltas.values() for tensor in delta.tensors)


@on_a_gpu
def test_a_copy_needs_room_and_goes_with_its_block() -> None:
    staging, packed = Staging(torch.device("cuda")), adapter(pinned=True)
    with staging.hold(KEY, packed, room=packed.bytes - 1):
        assert staging.take(KEY) is None
    other, room = ("b" * 64, None), packed.bytes
    with staging.hold(KEY, packed, room), staging.hold(other, packed, room):
        assert staging.take(other) is None, "the first copy uses the memory bound"
    assert staging.take(KEY) is None
    with staging.hold(KEY, packed, room=packed.bytes):
        staging.clear()
        assert staging.take(KEY) is None
