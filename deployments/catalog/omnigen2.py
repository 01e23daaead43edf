"""OmniGen2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.catalog.control_choices import main_only
from deployments.catalog.lazy import LazyModule
from deployments.catalog.model_spec import Checkpoint, ControlImages, ModelSpec, Preview

if TYPE_CHECKING:
    from deployments.pipelines import omnigen2
else:
    omnigen2 = LazyModule("deployments.pipelines.omnigen2")

ROWS = (
    ModelSpec(
        id="omnigen2",
        family="omnigen2",
        title="OmniGen2",
        pipeline=omnigen2.OmniGen2Pipeline,
        checkpoint=Checkpoint(repo="OmniGen2/OmniGen2"),
        arguments=omnigen2.reference_arguments,
        # The reference server merges LoRAs itself, in the dtype of the file.
        products_in_file_dtype=True,
        # Longer images would vanish: with the long side scaled to 1024, the short side is below 16.
        control_images=ControlImages(most=3, least_side=16, most_aspect=63),
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib={"transformer": 7.4, "mllm": 5.8, "vae": 0.16},
        licence="Apache-2.0",
        preview=Preview(
            differs="An empty negative prompt goes through the chat template twice, as all texts do. Only"
            " `ctrl_img` is used of the control images, stretched to the output size. Sizes are multiples of"
            " 8. LoRAs are not rounded to the dtype of their file.",
            fields={
                "divisor": 8,
                "arguments": omnigen2.reference_preview_arguments,
                "products_in_file_dtype": False,
                "control_images": ControlImages(most=1, choose=main_only),
            },
        ),
    ),
)
