"""The LoRA adapters of one pipeline: which are on the device, which are active, and with which multipliers.

Unlike peft's wrappers, an adapter never changes the model's module tree, and it changes weights only when it
is fused. Each layer that an adapter changes gets one forward hook, once, which adds the deltas of the active
adapters to the layer's output. All hooks read the active adapters from one object, so a switch is one
assignment, however many layers there are. This has several advantages:

- A multiplier lasts for one job only.
- Several adapters add up, and LoRA and LoKr may change the same layer.
- A failed load leaves nothing behind.
- Offload hooks stay in place.

The arithmetic is peft's: `base(x) + up(down(x)) * scale`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from cluster.metrics import Meter
from deployments.loras.adapters.compiled import Compiled
from deployments.loras.adapters.device_staging import Staging
from deployments.loras.adapters.fusing import Active, Fuser
from deployments.loras.adapters.host_tier import HostTier
from deployments.loras.adapters.layer_deltas import Layer
from deployments.loras.adapters.memory_tier import Key, Tier, key_of
from deployments.loras.adapters.packed_adapter import LayerName, Packed
from deployments.loras.sources.lora_file import LoraFile


class _Switch:
    """The active adapters, which the hooks of all layers read."""

    def __init__(self, compiled: Compiled | None) -> None:
        self._compiled = compiled
        self._active: Sequence[Active] = ()
        self._in_file_dtype = False

    def hook(self, name: LayerName, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of the layer `name`: add its active deltas to its output."""
        for deltas, multiplier in self._active:
            if delta := deltas.get(name):
                factor = multiplier * delta.scale
                added = delta(layer, inputs[0], factor, in_file_dtype=self._in_file_dtype)
                output = output + added.to(output.dtype)
        return output

    @contextmanager
    def on(self, active: Sequence[Active], *, in_file_dtype: bool) -> Iterator[None]:
        """Make these adapters active during the block."""
        before = self._active, self._in_file_dtype
        self._active, self._in_file_dtype = active, in_file_dtype
        try:
            compiled = self._compiled
            holding = compiled.holding(active, in_file_dtype=in_file_dtype) if compiled else nullcontext()
            with holding:
                yield
        finally:
            self._active, self._in_file_dtype = before


class Adapters:
    """The adapters of one pipeline's `layers` on its device, copied there from `host`.

    - `budget` limits their bytes on the device. The least recently used are dropped, but never active ones.
    - After `fuse_after` prompts in a row with the same adapters active, these are fused into the weights. If
      it is None, adapters are never fused.
    - `compiled` has the layers that are compiled.

    Use it from one thread. Only `holds` and `staged` are for other threads.
    """

    def __init__(
        self,
        layers: Mapping[LayerName, Layer],
        host: HostTier,
        device: torch.device,
        budget: int,
        *,
        fuse_after: int | None = None,
        compiled: Compiled | None = None,
    ) -> None:
        self._layers = layers
        self._host = host
        self._device = device
        self.meter = Meter("device")
        self._tier = Tier(budget, self.meter)
        self._staging = Staging(device)
        # Compiled layers already have a hook.
        self._hooked = set(compiled.layers) if compiled else set[LayerName]()
        self._switch = _Switch(compiled)
        self._wanted: list[tuple[Key, float]] = []
        self._active: list[Active] = []
        self._fuser = Fuser(layers)
        self._fuse_after = fuse_after
        self._in_file_dtype = False
        self._prompts = 0

    @property
    def resident(self) -> frozenset[str]:
        """The sha256 of each adapter on the device."""
        return self._tier.hashes

    @property
    def fused(self) -> bool:
        """True if the active adapters are fused into the weights."""
        return self._fuser.fused

    def activate(self, wanted: Sequence[tuple[LoraFile, float]]) -> list[str]:
        """Make exactly these adapters active, each with its multiplier. Return their warnings.

        The file of an adapter that is on the device is not read. Raises `JobFailure`
        (LORA_FORMAT_NOT_SUPPORTED, LORA_NO_MATCH, LORA_NOT_FOUND). The previous adapters then stay active.
        """
        keys = [key_of(file) for file, _ in wanted]
        packed = {key: self._load(file, keys) for key, (file, _) in zip(keys, wanted, strict=True)}
        new = [(key_of(file), multiplier) for file, multiplier in wanted]
        if new != self._wanted:
            self._wanted = new
            self._active = [(packed[key].deltas, multiplier) for key, multiplier in new]
            self._unfuse()
        self._tier.make_room(0, keys)
        return [each.warning for each in packed.values() if each.warning]

    def holds(self, file: LoraFile) -> bool:
        """Return whether the adapter of a file is on the device now. For any thread."""
        return key_of(file) in self._tier

    @contextmanager
    def staged(self, file: LoraFile, packed: Packed) -> Iterator[None]:
        """Start to copy an adapter to the device if it has free room. For any thread.

        If it is not activated before the block ends, the copy is dropped.
        """
        with self._staging.hold(key_of(file), packed, self._tier.room):
            yield

    @contextmanager
    def rendering(self, *, in_file_dtype: bool = False) -> Iterator[None]:
        """Apply the active adapters to the model for one prompt. Fuses them first if they are due.

        With `in_file_dtype` their products are rounded to the dtype of their files.
        """
        if in_file_dtype != self._in_file_dtype:
            self._in_file_dtype = in_file_dtype
            self._unfuse()
        if self._fuse_after and self._prompts == self._fuse_after:
            self._fuser.fuse(self._active, in_file_dtype=in_file_dtype)
        self._prompts += 1
        with self._switch.on(self._unfused, in_file_dtype=in_file_dtype):
            yield

    @contextmanager
    def joined_by(self, file: LoraFile, multiplier: float) -> Iterator[None]:
        """Make one more adapter active during the block. Use it within `rendering`. Raises as `activate`."""
        in_use = {key for key, _ in self._wanted}
        joining = self._load(file, {*in_use, key_of(file)})
        together = [*self._unfused, (joining.deltas, multiplier)]
        try:
            with self._switch.on(together, in_file_dtype=self._in_file_dtype):
                yield
        finally:
            self._tier.make_room(0, in_use)

    def drop(self) -> None:
        """Deactivate all adapters and drop them from the device."""
        self._wanted, self._active = [], []
        self._unfuse()
        self._staging.clear()
        self._tier.clear()

    def _unfuse(self) -> None:
        """Restore the original weights and count prompts from 0 again."""
        self._fuser.restore()
        self._prompts = 0

    @property
    def _unfused(self) -> Sequence[Active]:
        """The active adapters that the hooks must add, because they are not fused."""
        return () if self.fused else self._active

    def _load(self, file: LoraFile, in_use: Collection[Key]) -> Packed:
        """Return an adapter on the device. Copies it there if necessary."""
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
