"""Generates the model pages from the catalogue and the notes: `python docs/models/generate.py`."""

from __future__ import annotations

import json
from pathlib import Path

from deployments.catalog import CATALOG, Checkpoint, ModelSpec
from deployments.catalog.memory import needed_gib

FOLDER = Path(__file__).parent


def render_pages() -> dict[str, str]:
    """Return the text of every generated page, by file name."""
    pages = {f"{spec.id}.md": _page(spec) for spec in CATALOG.values()}
    return pages | {"README.md": _index()}


def _index() -> str:
    rows = [
        f"| [`{spec.id}`]({spec.id}.md) | {spec.title} | {_repositories(spec)} | {_controls(spec)} |"
        for spec in CATALOG.values()
    ]
    about = (
        "Each page has a model's defaults, an example request, its memory needs, its LoRA formats, and what\n"
        "to compare if a picture differs from the trainer's preview."
    )
    head = ["# Models", "", about, "", "| id | model | checkpoint | control images |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _page(spec: ModelSpec) -> str:
    notes = (FOLDER / "notes" / f"{spec.family}.md").read_text().strip()
    sections = [
        f"# {spec.title}: `{spec.id}`",
        _facts(spec),
        "## Defaults\n\n" + _defaults(spec),
        "## A request\n\n```json\n" + json.dumps(_example(spec), indent=2) + "\n```",
        "## Memory\n\n" + _memory(spec),
        "## LoRA arithmetic\n\n" + _arithmetic(spec),
        notes,
        '## `"sampling": "preview"`\n\n' + _preview(spec),
    ]
    return "\n\n".join(sections) + "\n"


def _facts(spec: ModelSpec) -> str:
    gated = any(checkpoint.gated for checkpoint in _checkpoints(spec))
    access = "gated: accept its terms on the hub and set `HF_TOKEN`" if gated else "open"
    return f"Checkpoint: {_repositories(spec)} ({access}). Licence: {spec.licence}."


def _defaults(spec: ModelSpec) -> str:
    rows = {
        "`width` x `height`": f"{spec.width} x {spec.height}, rounded down to a multiple of {spec.divisor}",
        "`sample_steps`": spec.steps,
        "`guidance_scale`": spec.guidance,
        "`neg`": "used" if spec.negative_prompt else "accepted but ignored",
        "control images": _controls(spec),
        "`output_format`": ", ".join(f"`{name}`" for name in spec.formats),
    }
    if spec.high:
        rows["`resolution`"] = "`Default`, or `High` for twice the size (not in previews)"
    if spec.video:
        only = "" if spec.video.other_fps == "taken" else " only"
        rows["`num_frames`, `fps`"] = f"{spec.video.frames}, {spec.video.fps}{only}"
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| field | value |", "|---|---|", *lines])


def _preview(spec: ModelSpec) -> str:
    same = "For this model the sampling is the same as by default."
    differs = spec.preview.differs if spec.preview else same
    return (
        f"Renders the sample picture that the trainer would show for this request. {differs}"
        " Flags in prompts, such as `--w 512`, are obeyed."
    )


def _memory(spec: ModelSpec) -> str:
    parts = ", ".join(f"{name} {gib:g}" for name, gib in spec.memory_gib.items())
    modes = ", ".join(f"`{mode}` {gib:.0f}" for mode, gib in needed_gib(spec).items())
    return (
        f"Components in bfloat16, in GiB: {parts}.\n"
        f"Estimated GPU memory in GiB, by `OFFLOAD_MODE`: {modes}.\n"
        "`lora-serve models --gpu GIB` shows which models fit on a GPU."
    )


def _arithmetic(spec: ModelSpec) -> str:
    text = (
        "A LoRA adds to the output of the layers and does not change their weights. It is computed in the\n"
        "dtype of the weights: bfloat16 on a GPU that supports it, else float16, and float32 on the CPU.\n"
        "The trainer's previews do the same for quantised models. For other models the trainer merges the\n"
        "LoRA into the weights in float32, as [`fuse_after`](../performance.md#fused-loras) does. In\n"
        "float32 both ways are equal."
    )
    if not spec.products_in_file_dtype:
        return text
    return text + (
        "\n\nAs in the reference server, the product of a LoRA's matrices is rounded to the dtype of its\n"
        "file before it is used in a wider one. Previews do not round it, and neither does the trainer."
    )


def _example(spec: ModelSpec) -> dict[str, object]:
    prompt: dict[str, object] = {"prompt": "a red fox in the snow", "seed": 42}
    if spec.control_images.least:
        prompt["ctrl_img"] = "https://example.org/fox.png"
    loras: list[dict[str, str]] = [{"path": "my_style.safetensors"}]
    if spec.experts:
        loras = [{"path": f"my_style_{expert}.safetensors", "transformer": expert} for expert in spec.experts]
    return {"model": spec.id, "loras": loras, "prompts": [prompt]}


def _controls(spec: ModelSpec) -> str:
    least, most = spec.control_images.least, spec.control_images.most
    if not most:
        return "ignored"
    if least == most:
        return f"{most}, required"
    return f"{least} to {most}" if least else f"up to {most}"


def _checkpoints(spec: ModelSpec) -> list[Checkpoint]:
    high = [spec.high.upsampler.checkpoint, spec.high.lora] if spec.high else []
    return [spec.checkpoint, *(part.checkpoint for part in spec.parts.values()), *high]


def _repositories(spec: ModelSpec) -> str:
    repos = dict.fromkeys(checkpoint.repo for checkpoint in _checkpoints(spec))
    return ", ".join(f"[{repo}](https://huggingface.co/{repo})" for repo in repos)


if __name__ == "__main__":
    for name, text in render_pages().items():
        (FOLDER / name).write_text(text)
