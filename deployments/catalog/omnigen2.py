"""OmniGen2."""

from __future__ import annotations

from deployments.catalog.control_choices import main_only
from deployments.catalog.model_spec import Checkpoint, ControlImages, ModelSpec, Preview

ROWS = (
    ModelSpec(
        id="omnigen2",
        family="omnigen2",
        title="OmniGen2",
        pipeline="deployments.pipelines.omnigen2.OmniGen2Pipeline",
        checkpoint=Checkpoint(repo="OmniGen2/OmniGen2"),
        arguments="reference_arguments",
        # The reference server merges LoRAs by hand.
        products_in_file_dtype=True,
        # Of longer ones nothing would be left: their long side becomes 1024, their short one less than 16.
        control_images=ControlImages(most=3, least_side=16, most_aspect=63),
        steps=25,
        guidance=4.0,
        divisor=16,
        memory_gib={"transformer": 7.4, "mllm": 5.8, "vae": 0.16},
        licence="Apache-2.0",
        preview=Preview(
            differs="The empty negative prompt is put in the template twice, as all texts are; of the control"
            " images `ctrl_img` alone is seen, stretched to the output; sizes are multiples of 8; LoRAs are"
            " not rounded to the dtype of their file.",
            fields={
                "divisor": 8,
                "arguments": "reference_preview_arguments",
                "products_in_file_dtype": False,
                "control_images": ControlImages(most=1, choose=main_only),
            },
        ),
    ),
)
