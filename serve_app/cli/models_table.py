"""The table of `lora-serve models`: the GPU memory that each model needs."""

from __future__ import annotations

from deployments.catalog import CATALOG
from deployments.catalog.memory import fastest_offload, needed_gib

_MODES = ("none", "text", "model", "group")


def models_table(gpu_gib: float | None) -> str:
    """Return one line per model: GiB of GPU memory in each `OFFLOAD_MODE`, and the fastest mode that fits."""
    head = f"{'model':<28}" + "".join(f"{mode:>8}" for mode in _MODES)
    lines = [head if gpu_gib is None else f"{head}  on {gpu_gib:g} GiB"]
    for spec in CATALOG.values():
        needed = needed_gib(spec)
        line = f"{spec.id:<28}" + "".join(f"{needed[mode]:>8.1f}" for mode in _MODES)
        if gpu_gib is not None:
            line += f"  {fastest_offload(spec, gpu_gib) or 'does not fit'}"
        lines.append(line)
    return "\n".join(lines) + "\n"
