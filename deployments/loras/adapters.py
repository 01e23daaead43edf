"""The LoRA adapters on one pipeline: which are on the device, and which are active with what multiplier.

An adapter never touches the model's weights or module tree, as peft's wrappers would. Each layer that some
adapter changes gets one forward hook, once, which adds the active adapters' deltas to the layer's output. The
hooks look into one place: a switch is one assignment there, whatever the number of layers. So a multiplier
holds for one job only, several adapters add up, LoRA and LoKr meet on one layer, a failed load leaves nothing
behind, and offload hooks stay in place. The arithmetic is peft's own: `base(x) + up(down(x)) * scale`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from cluster.metrics import Meter
from deployments.loras.deltas import Delta, Layer
from deployments.loras.host import HostTier
from deployments.loras.packed import LayerName, Packed
from deployments.loras.references import LoraFile
from deployments.loras.staging import Staging
from deployments.loras.tiers import Key, Tier, key_of

Active: TypeAlias = tuple[Mapping[LayerName, Delta], float]
"""The deltas of an adapter, and its multiplier."""


class _Switch:
    """What the hooks of all layers add; with no active adapters that is nothing."""

    def __init__(self) -> None:
        self.active: Sequence[Active] = ()
        self.in_file_dtype = False

    def hook(self, name: LayerName, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the active deltas for the layer of this name to its output."""
        for deltas, multiplier in self.active:
            if delta := deltas.get(name):
                added = delta(layer, inputs[0], in_file_dtype=self.in_file_dtype)
                output = output + (added * (multiplier * delta.scale)).to(output.dtype)
        return output


class Adapters:
    """The adapters of one pipeline's `layers` on its device, brought there from `host`.

    `budget` bounds their bytes on the device: the least recently used go, never an active one. For one
    thread only, but for `holds` and `staged`.
    """

    def __init__(
        self, layers: Mapping[LayerName, Layer], host: HostTier, device: torch.device, budget: int
    ) -> None:
        self._layers = layers
        self._host = host
        self._device = device
        self.meter = Meter("device")
        self._tier = Tier(budget, self.meter)
        self._staging = Staging(device)
        self._hooked: set[LayerName] = set()
        self._switch = _Switch()
        self._in_use: frozenset[Key] = frozenset()

    @property
    def resident(self) -> frozenset[str]:
        """The sha256 of each adapter on the device."""
        return self._tier.hashes

    def activate(self, wanted: Sequence[tuple[LoraFile, float]]) -> list[str]:
        """Make exactly these adapters active, each with its multiplier; returns warnings.

        An adapter on the device is taken as it is, without looking at its file. Raises `JobFailure`
        (LORA_FORMAT_NOT_SUPPORTED, LORA_NO_MATCH, LORA_NOT_FOUND), and what was active stays so.
        """
        in_use = dict.fromkeys(key_of(file) for file, _ in wanted)
        packed = {key_of(file): self._bring(file, in_use) for file, _ in wanted}
        self._switch.active = [(packed[key_of(file)].deltas, multiplier) for file, multiplier in wanted]
        self._in_use = frozenset(in_use)
        self._tier.make_room(0, self._in_use)
        return [each.warning for each in packed.values() if each.warning]

    def holds(self, file: LoraFile) -> bool:
        """Whether the adapter of a file is on the device now; any thread may ask."""
        return key_of(file) in self._tier

    @contextmanager
    def staged(self, file: LoraFile, packed: Packed) -> Iterator[None]:
        """Begin to copy an adapter to the device if there is room beside those there; any thread may.

        If it is not activated before the block ends, the copy is dropped.
        """
        with self._staging.hold(key_of(file), packed, self._tier.room):
            yield

    def form_products(self, *, in_file_dtype: bool) -> None:
        """Let the active LoRAs round their products to their file's dtype, or not."""
        self._switch.in_file_dtype = in_file_dtype

    @contextmanager
    def joined_by(self, file: LoraFile, multiplier: float) -> Iterator[None]:
        """Make one more adapter active beside those that are, for a while. Raises as `activate`."""
        active = self._switch.active
        joining = self._bring(file, {*self._in_use, key_of(file)})
        self._switch.active = [*active, (joining.deltas, multiplier)]
        try:
            yield
        finally:
            self._switch.active = active
            self._tier.make_room(0, self._in_use)

    def drop(self) -> None:
        """Deactivate every adapter and forget it on the device."""
        self._switch.active = ()
        self._in_use = frozenset()
        self._staging.clear()
        self._tier.clear()

    def _bring(self, file: LoraFile, in_use: Collection[Key]) -> Packed:
        """Return an adapter on the device, copied there if it was not."""
        if resident := self._tier.find(key_of(file)):
            return resident
        with self._host.use(file) as packed:
            self._tier.make_room(packed.bytes, in_use)
            started = time.perf_counter()
            resident = self._staging.take(key_of(file)) or packed.copy(self._device)
            self._host.meter.read(packed.buffer.nbytes, time.perf_counter() - started)
        self._tier.add(key_of(file), resident)
        for name in resident.deltas.keys() - self._hooked:
            self._layers[name].register_forward_hook(partial(self._switch.hook, name))
            self._hooked.add(name)
        return resident
