"""Recovers from a lack of device memory: drops all adapters and tries once more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from cluster.failures import FailureCode, JobFailure
from deployments.engine.engine import Engine

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def fit(engine: Engine, what: str, action: Callable[[], _T]) -> _T:
    """Run `action`; if the device has no memory for it, drop all adapters and run it once more.

    `what` names the work in the log and the error. Raises `JobFailure` (OUT_OF_MEMORY) if both tries fail.
    """
    try:
        return action()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        logger.warning("out of device memory for %s; dropping all adapters for a second try", what)
    # Outside the handlers: inside one, the exception's frames would still hold the tensors.
    engine.drop_adapters()
    try:
        return action()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
    raise JobFailure(FailureCode.OUT_OF_MEMORY, f"the device has too little memory for {what}")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory ran out. On the CPU only the error's text says so (torch's alloc_cpu.cpp)."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)
