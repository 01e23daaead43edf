"""How far one prompt's pipeline is, told while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from cluster.jobs.model import Phase


class Observer(Protocol):
    """Who follows a prompt; an exception from either method ends it and leaves the engine usable."""

    def on_phase(self, phase: Phase) -> None:
        """Report that a phase begins: ENCODE, STEP when the first step is done, DECODE after the last.

        It is told of the phase again for each piece that a VAE has done: a video has many.
        """
        ...

    def on_step(self, done: int, total: int) -> None:
        """Report that `done` of `total` denoising steps are done."""
        ...


class Progress:
    """Tells an observer where a pipeline is, from its callback and its VAE; begins with the phase ENCODE."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._enter(Phase.ENCODE)

    def after_step(self, pipeline: Any, step: int, *_: object) -> dict[str, Any]:  # noqa: ANN401
        """Tell of a step, as the callback of any pipeline."""
        if step == 0:
            self._enter(Phase.STEP)
        self._observer.on_step(step + 1, pipeline.num_timesteps)
        if step + 1 == pipeline.num_timesteps:
            self._enter(Phase.DECODE)
        return {}

    def after_piece(self, *_: object) -> dict[str, Any]:
        """Tell that the phase goes on, as the callback of a pipeline that refines what another one made."""
        self._enter(self._phase)
        return {}

    @contextmanager
    def of_pieces(self, vae: Any) -> Iterator[None]:  # noqa: ANN401 - a VAE, or None
        """Tell of each layer that a VAE has done: it takes no callback, and a video keeps it for minutes."""
        layers = vae.modules() if isinstance(vae, torch.nn.Module) else ()
        handles = [layer.register_forward_hook(lambda *_: self._enter(self._phase)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._observer.on_phase(phase)
