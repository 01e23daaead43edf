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
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from cluster.metrics import Meter
from deployments.loras.adapters.compiled import Compiled
from deployments.loras.adapters.deltas import Layer
from deployments.loras.adapters.fusing import Active, Fuser
from deployments.loras.adapters.host import HostTier
from deployments.loras.adapters.packed import LayerName, Packed
from deployments.loras.adapters.staging import Staging
from deployments.loras.adapters.tiers import Key, Tier, key_of
from deployments.loras.sources.lora_root import LoraFile


class _Switch:
    """What the hooks of all layers add; with no active adapters that is nothing."""

    def __init__(self, compiled: Compiled | None) -> None:
        self._compiled = compiled
        self._active: Sequence[Active] = ()
        self._in_file_dtype = False

    def hook(self, name: LayerName, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the active deltas for the layer of this name to its output."""
        for deltas, multiplier in self._active:
            if delta := deltas.get(name):
                factor = multiplier * delta.scale
                added = delta(layer, inputs[0], factor, in_file_dtype=self._in_file_dtype)
                output = output + added.to(output.dtype)
        return output

    @contextmanager
    def on(self, active: Sequence[Active], *, in_file_dtype: bool) -> Iterator[None]:
        """Let these add to what runs in the block."""
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
    """The adapters of one pipeline's `layers` on its device, brought there from `host`.

    `budget` bounds their bytes on the device: the least recently used go, never an active one. After
    `fuse_after` prompts in a row with the same ones active these are fused with the weights, if it is given.
    `compiled` has those of the layers that are compiled. For one thread only, but for `holds` and `staged`.
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
        # Compiled layers have a hook of their own.
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
        """Whether the active adapters are fused with the weights."""
        return self._fuser.fused

    def activate(self, wanted: Sequence[tuple[LoraFile, float]]) -> list[str]:
        """Make exactly these adapters active, each with its multiplier; returns warnings.

        An adapter on the device is taken as it is, without looking at its file. Raises `JobFailure`
        (LORA_FORMAT_NOT_SUPPORTED, LORA_NO_MATCH, LORA_NOT_FOUND), and what was active stays so.
        """
        keys = [key_of(file) for file, _ in wanted]
        packed = {key: self._bring(file, keys) for key, (file, _) in zip(keys, wanted, strict=True)}
        new = [(key_of(file), multiplier) for file, multiplier in wanted]
        if new != self._wanted:
            self._wanted = new
            self._active = [(packed[key].deltas, multiplier) for key, multiplier in new]
            self._separate()
        self._tier.make_room(0, keys)
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

    @contextmanager
    def rendering(self, *, in_file_dtype: bool = False) -> Iterator[None]:
        """Let the active adapters add to the model's layers for one prompt; fuse them first if it is time.

        With `in_file_dtype` their products are rounded to the dtype of their files.
        """
        if in_file_dtype != self._in_file_dtype:
            self._in_file_dtype = in_file_dtype
            self._separate()
        if self._fuse_after and self._prompts == self._fuse_after:
            self._fuser.fuse(self._active, in_file_dtype=in_file_dtype)
        self._prompts += 1
        with self._switch.on(self._beside, in_file_dtype=in_file_dtype):
            yield

    @contextmanager
    def joined_by(self, file: LoraFile, multiplier: float) -> Iterator[None]:
        """Make one more adapter active beside those that are, while one renders. Raises as `activate`."""
        in_use = {key for key, _ in self._wanted}
        joining = self._bring(file, {*in_use, key_of(file)})
        together = [*self._beside, (joining.deltas, multiplier)]
        try:
            with self._switch.on(together, in_file_dtype=self._in_file_dtype):
                yield
        finally:
            self._tier.make_room(0, in_use)

    def drop(self) -> None:
        """Deactivate every adapter and forget it on the device."""
        self._wanted, self._active = [], []
        self._separate()
        self._staging.clear()
        self._tier.clear()

    def _separate(self) -> None:
        """Put pristine weights back, and begin a new run of prompts."""
        self._fuser.restore()
        self._prompts = 0

    @property
    def _beside(self) -> Sequence[Active]:
        """The active adapters that are not in the weights."""
        return () if self.fused else self._active

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
