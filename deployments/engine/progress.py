"""Reports the progress of one prompt's pipeline while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from cluster.jobs.model import Phase


class Observer(Protocol):
    """Receives a prompt's progress. An exception from a method ends the prompt; the engine stays usable."""

    def on_phase(self, phase: Phase) -> None:
        """Handle the start of a phase: ENCODE, STEP when the first step is done, DECODE after the last.

        Called again with the same phase for each VAE layer that has run, which for a video happens often.
        """
        ...

    def on_step(self, done: int, total: int) -> None:
        """Handle that `done` of `total` denoising steps are done."""
        ...


class Progress:
    """Reports a pipeline's progress to an observer, from its callback and its VAE. Starts in phase ENCODE."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._enter(Phase.ENCODE)

    def after_step(self, pipeline: Any, step: int, *_: object) -> dict[str, Any]:  # noqa: ANN401
        """Report a step; passed to a pipeline as its step callback."""
        if step == 0:
            self._enter(Phase.STEP)
        self._observer.on_step(step + 1, pipeline.num_timesteps)
        if step + 1 == pipeline.num_timesteps:
            self._enter(Phase.DECODE)
        return {}

    def after_piece(self, *_: object) -> dict[str, Any]:
        """Report the current phase again; passed as step callback to a pipeline that refines an output."""
        self._enter(self._phase)
        return {}

    @contextmanager
    def of_pieces(self, vae: Any) -> Iterator[None]:  # noqa: ANN401 - a VAE, or None
        """Report each layer that a VAE runs: it takes no callback, and decoding a video takes minutes."""
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
