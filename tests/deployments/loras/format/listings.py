"""Listings of LoRA files as their makers write them: names and shapes, no weights.

Sizes are those of the real models. `{N}` in a name stands for each number below N.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from deployments.loras.format.dialects import Dialect
from deployments.loras.format.header import Header, TensorInfo

Shape = tuple[int, ...]
Modules = dict[str, Shape]
Form = Callable[[Shape], dict[str, Shape]]

RANK = 8


@dataclass(frozen=True)
class Listing:
    """A file: its modules with the shapes of the weights they change, and the expected findings.

    `form` is how one module is written: the two matrices' suffixes, with or without alpha, or LoKr's factors.
    `models` are the ids that it fits completely.
    """

    dialect: Dialect
    form: str
    modules: Modules
    models: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> Header:
        """Return the header of a file with these modules."""
        tensors: dict[str, Shape] = {}
        for stem, shape in self.modules.items():
            tensors |= {f"{stem}{suffix}": part for suffix, part in FORMS[self.form](shape).items()}
        return Header({name: TensorInfo("BF16", shape) for name, shape in tensors.items()}, self.metadata)


def _pair(down: str, up: str, *more: str) -> Form:
    def parts(shape: Shape) -> dict[str, Shape]:
        ones = (1,) * len(shape[2:])
        return {down: (RANK, *shape[1:]), up: (shape[0], RANK, *ones)} | dict.fromkeys(more, ())

    return parts


def _lokr_whole(shape: Shape) -> dict[str, Shape]:
    return {".lokr_w1": (4, 4), ".lokr_w2": (shape[0] // 4, shape[1] // 4), ".alpha": ()}


def _lokr_split(shape: Shape) -> dict[str, Shape]:
    halves = {".lokr_w2_a": (shape[0] // 4, RANK), ".lokr_w2_b": (RANK, shape[1] // 4)}
    return {".lokr_w1": (4, 4), **halves, ".alpha": ()}


FORMS: Mapping[str, Form] = {
    "lora_A": _pair(".lora_A.weight", ".lora_B.weight"),
    "lora_A.default": _pair(".lora_A.default.weight", ".lora_B.default.weight"),
    "lora_down, alpha": _pair(".lora_down.weight", ".lora_up.weight", ".alpha"),
    "_lora.down": _pair("_lora.down.weight", "_lora.up.weight"),
    ".down": _pair(".down.weight", ".up.weight"),
    "lokr": _lokr_whole,
    "lokr split": _lokr_split,
}


def expand(modules: Mapping[str, Shape], prefix: str = "") -> Modules:
    """Expand each `{N}` into the numbers below N."""
    return {f"{prefix}{name}": shape for pattern, shape in modules.items() for name in _names(pattern)}


def _names(pattern: str) -> Iterator[str]:
    pieces = re.split(r"\{(\d+)\}", pattern)
    for numbers in itertools.product(*(range(int(end)) for end in pieces[1::2])):
        yield "".join(
            map(str, itertools.chain.from_iterable(itertools.zip_longest(pieces[::2], numbers, fillvalue="")))
        )


def flat(modules: Modules, prefix: str) -> Modules:
    """Replace dots by underscores, as kohya's files do."""
    return {prefix + name.replace(".", "_"): shape for name, shape in modules.items()}


def flux(double: int, single: int = 38, h: int = 3072) -> Modules:
    """FLUX.1's blocks by diffusers' names."""
    square = (h, h)
    attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    in_double: Modules = {f"attn.{name}": square for name in attention}
    for stream in ("ff", "ff_context"):
        in_double |= {f"{stream}.net.0.proj": (4 * h, h), f"{stream}.net.2": (h, 4 * h)}
    in_double |= {"norm1.linear": (6 * h, h), "norm1_context.linear": (6 * h, h)}
    in_single: Modules = {f"attn.{name}": square for name in ("to_q", "to_k", "to_v")}
    in_single |= {"proj_mlp": (4 * h, h), "proj_out": (h, 5 * h), "norm.linear": (3 * h, h)}
    return expand(
        {f"transformer_blocks.{{{double}}}.{name}": shape for name, shape in in_double.items()}
    ) | expand({f"single_transformer_blocks.{{{single}}}.{name}": shape for name, shape in in_single.items()})


def original(double: int, single: int, h: int, mlp_out: int, mlp_in: int) -> Modules:
    """The blocks of FLUX.1, FLUX.2 or Chroma by their original names; the MLP's sizes are in units of h."""
    modules: Modules = {}
    for stream in ("img", "txt"):
        block = f"double_blocks.{{{double}}}.{stream}_"
        modules |= {f"{block}attn.qkv": (3 * h, h), f"{block}attn.proj": (h, h)}
        modules |= {f"{block}mlp.0": (mlp_out * h, h), f"{block}mlp.2": (h, mlp_in * h)}
    block = f"single_blocks.{{{single}}}."
    modules |= {f"{block}linear1": ((3 + mlp_out) * h, h), f"{block}linear2": (h, (1 + mlp_in) * h)}
    return expand(modules)


def flux_original(double: int = 19) -> Modules:
    """FLUX.1's blocks by their original names, with the modulations, which Chroma lacks."""
    h = 3072
    return original(double, 38, h, 4, 4) | expand(
        {
            f"double_blocks.{{{double}}}.img_mod.lin": (6 * h, h),
            f"double_blocks.{{{double}}}.txt_mod.lin": (6 * h, h),
            "single_blocks.{38}.modulation.lin": (3 * h, h),
        }
    )


def clip(layers: int, width: int) -> Modules:
    """CLIP's text model, with the `text_model` level that transformers 5 dropped."""
    attention = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    layer = attention | {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    return expand({f"text_model.encoder.layers.{{{layers}}}.{name}": shape for name, shape in layer.items()})


def zimage(*stages: str) -> Modules:
    h, modules = 3840, {}
    for stage in stages:
        modules |= {f"{stage}.attention.{name}": (h, h) for name in ("to_q", "to_k", "to_v", "to_out.0")}
        modules |= {f"{stage}.feed_forward.{name}": (10240, h) for name in ("w1", "w3")}
        modules |= {f"{stage}.feed_forward.w2": (h, 10240), f"{stage}.adaLN_modulation.0": (4 * h, 256)}
    return expand(modules)


def zimage_fused() -> Modules:
    modules = {name: shape for name, shape in zimage("layers.{30}").items() if ".to_" not in name}
    return modules | expand(
        {"layers.{30}.attention.qkv": (11520, 3840), "layers.{30}.attention.out": (3840, 3840)}
    )


def qwen() -> Modules:
    h, block = 3072, "transformer_blocks.{60}."
    attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    modules: Modules = {f"{block}attn.{name}": (h, h) for name in attention}
    for stream in ("img", "txt"):
        modules |= {f"{block}{stream}_mlp.net.0.proj": (4 * h, h), f"{block}{stream}_mlp.net.2": (h, 4 * h)}
        modules[f"{block}{stream}_mod.1"] = (6 * h, h)
    return expand(modules)


def lumina2(fused: bool) -> Modules:
    h, modules = 2304, {}
    for stage in ("layers.{26}", "noise_refiner.{2}", "context_refiner.{2}"):
        norm = {} if stage.startswith("context") else {"norm1.linear": (4 * h, 1024)}
        block: Modules = {"attn.to_q": (h, h), "attn.to_k": (768, h), "attn.to_v": (768, h), **norm}
        block |= {"attn.to_out.0": (h, h), "feed_forward.linear_2": (h, 4 * h)}
        block |= {"feed_forward.linear_1": (4 * h, h), "feed_forward.linear_3": (4 * h, h)}
        if fused:
            block = {"attention.qkv": (3840, h), "attention.out": (h, h), "feed_forward.w2": (h, 4 * h)}
            block |= {"feed_forward.w1": (4 * h, h), "feed_forward.w3": (4 * h, h)}
            if norm:
                block["adaLN_modulation.1"] = norm["norm1.linear"]
        modules |= {f"{stage}.{name}": shape for name, shape in block.items()}
    return expand(modules)


KREA2 = ("krea2", "krea2_turbo", "krea2_o_edit", "krea2_o_edit_turbo")


def krea2() -> Modules:
    modules: Modules = {}
    for stage, h, kv, mlp in (
        ("blocks.{28}", 6144, 1536, 16384),
        ("txtfusion.layerwise_blocks.{2}", 2560, 2560, 6912),
        ("txtfusion.refiner_blocks.{2}", 2560, 2560, 6912),
    ):
        modules |= {f"{stage}.attn.{name}": (h, h) for name in ("wq", "wo", "gate")}
        modules |= {f"{stage}.attn.{name}": (kv, h) for name in ("wk", "wv")}
        modules |= {f"{stage}.mlp.{name}": (mlp, h) for name in ("gate", "up")} | {
            f"{stage}.mlp.down": (h, mlp)
        }
    return expand(modules)


def hidream() -> Modules:
    h, modules = 2560, {}
    for stage, chunks, streams in (
        ("double_stream_blocks.{16}", 12, ("", "_t")),
        ("single_stream_blocks.{32}", 6, ("",)),
    ):
        modules[f"{stage}.block.adaLN_modulation.1"] = (chunks * h, h)
        for name in ("to_q", "to_k", "to_v", "to_out"):
            modules |= {f"{stage}.block.attn1.{name}{stream}": (h, h) for stream in streams}
        for part, width in (("ff_t", 6912), ("ff_i.shared_experts", 3584))[2 - len(streams) :]:
            modules |= {f"{stage}.block.{part}.{name}": (width, h) for name in ("w1", "w3")}
            modules[f"{stage}.block.{part}.w2"] = (h, width)
    return expand(modules)


def attention(place: str, h: int, depth: int, context: int, kernel: Shape = ()) -> Modules:
    """A transformer of Stable Diffusion's UNet."""
    block = f"{place}.transformer_blocks.{{{depth}}}."
    modules: Modules = {f"{place}.proj_in": (h, h, *kernel), f"{place}.proj_out": (h, h, *kernel)}
    for name, width in (("attn1", h), ("attn2", context)):
        modules |= {f"{block}{name}.to_q": (h, h), f"{block}{name}.to_out.0": (h, h)}
        modules |= {f"{block}{name}.to_k": (h, width), f"{block}{name}.to_v": (h, width)}
    modules |= {f"{block}ff.net.0.proj": (8 * h, h), f"{block}ff.net.2": (h, 4 * h)}
    return expand(modules)


def sd15() -> Modules:
    modules: Modules = attention("mid_block.attentions.0", 1280, 1, 768, (1, 1))
    for level, h in enumerate((320, 640, 1280)):
        for index in range(2):
            modules |= attention(f"down_blocks.{level}.attentions.{index}", h, 1, 768, (1, 1))
        for index in range(3):
            modules |= attention(f"up_blocks.{3 - level}.attentions.{index}", h, 1, 768, (1, 1))
    return modules


def sd15_convolutions() -> Modules:
    return {
        "down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
        "down_blocks.1.resnets.0.conv_shortcut": (640, 320, 1, 1),
        "down_blocks.2.resnets.1.time_emb_proj": (1280, 1280),
        "down_blocks.0.downsamplers.0.conv": (320, 320, 3, 3),
        "up_blocks.0.upsamplers.0.conv": (1280, 1280, 3, 3),
        "up_blocks.3.resnets.2.conv2": (320, 320, 3, 3),
    }


def sdxl() -> Modules:
    """SDXL by diffusers' names, as the trainer writes them."""
    modules: Modules = attention("mid_block.attentions.0", 1280, 10, 2048)
    for level, h, depth in ((1, 640, 2), (2, 1280, 10)):
        for index in range(2):
            modules |= attention(f"down_blocks.{level}.attentions.{index}", h, depth, 2048)
        for index in range(3):
            modules |= attention(f"up_blocks.{2 - level}.attentions.{index}", h, depth, 2048)
    return modules


def sdxl_original() -> Modules:
    """SDXL by the original names, as sd-scripts writes them, with some convolutions as LyCORIS has them."""
    modules: Modules = attention("middle_block.1", 1280, 10, 2048)
    for row, h, depth in ((4, 640, 2), (5, 640, 2), (7, 1280, 10), (8, 1280, 10)):
        modules |= attention(f"input_blocks.{row}.1", h, depth, 2048)
    for row, h, depth in ((0, 1280, 10), (1, 1280, 10), (2, 1280, 10), (3, 640, 2), (4, 640, 2), (5, 640, 2)):
        modules |= attention(f"output_blocks.{row}.1", h, depth, 2048)
    return modules | {
        "input_blocks.0.0": (320, 4, 3, 3),
        "input_blocks.1.0.in_layers.2": (320, 320, 3, 3),
        "input_blocks.3.0.op": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection": (640, 320, 1, 1),
        "input_blocks.7.0.emb_layers.1": (1280, 1280),
        "middle_block.2.out_layers.3": (1280, 1280, 3, 3),
        "output_blocks.2.2.conv": (1280, 1280, 3, 3),
        "output_blocks.8.0.in_layers.2": (320, 640, 3, 3),
        "time_embed.0": (1280, 320),
        "label_emb.0.2": (1280, 1280),
        "out.2": (4, 320, 3, 3),
    }


def ltx2(*, gated: bool) -> Modules:
    """The blocks of LTX-2, or of LTX-2.3 with its gated attentions, as the trainer writes them."""
    modules: Modules = {}
    for name, out, inner, context in (
        ("attn1", 4096, 4096, 4096),
        ("attn2", 4096, 4096, 4096),
        ("audio_attn1", 2048, 2048, 2048),
        ("audio_attn2", 2048, 2048, 2048),
        ("audio_to_video_attn", 4096, 2048, 2048),
        ("video_to_audio_attn", 2048, 2048, 4096),
    ):
        modules |= {f"{name}.to_q": (inner, out), f"{name}.to_out.0": (out, inner)}
        modules |= {f"{name}.to_k": (inner, context), f"{name}.to_v": (inner, context)}
        if gated:
            modules[f"{name}.to_gate_logits"] = (32, out)
    for name, h in (("ff", 4096), ("audio_ff", 2048)):
        modules |= {f"{name}.net.0.proj": (4 * h, h), f"{name}.net.2": (h, 4 * h)}
    return expand({f"transformer_blocks.{{48}}.{name}": shape for name, shape in modules.items()})


LTX_2_AROUND: Modules = {
    "patchify_proj": (4096, 128),
    "audio_patchify_proj": (2048, 128),
    "adaln_single.linear": (9 * 4096, 4096),
    "prompt_adaln_single.emb.timestep_embedder.linear_2": (4096, 4096),
    "av_ca_a2v_gate_adaln_single.linear": (4096, 4096),
}
"""Layers of LTX-2.3, by the original names."""


def minimax_h3(adaln_inputs: int) -> Modules:
    """MiniMax-H3 as the trainer writes it, for the pruned base, whose AdaLN has 8 inputs, or the full one."""
    block: Modules = {
        "attn.qkv_proj": (3 * 7168, 5376),
        "attn.out_proj": (5376, 7168),
        "mlp.fc1": (2 * 14336, 5376),
        "mlp.fc2": (5376, 14336),
    }
    refiner = {f"token_refiner.blocks.{{2}}.{name}": shape for name, shape in block.items()}
    block["adaln_proj.linear"] = (18 * 5376, adaln_inputs)
    return expand({f"blocks.{{50}}.{name}": shape for name, shape in block.items()} | refiner)


H3_AROUND: Modules = {
    "video_patch_proj": (5376, 96),
    "condition_proj": (5376, 5120),
    "time_embedder.proj_out": (2688, 5376),
    "final_layer.audio_out": (32, 5376),
    "final_layer.adaln_proj.linear": (2 * 5376, 2688),
}

FLUX = ("flux", "flux_kontext")
FLEX = (*FLUX, "flex1", "flex2")
ZIMAGE = ("zimage", "zimage_turbo", "zimage_deturbo")
QWEN = (
    "qwen_image",
    "qwen_image_2512",
    "qwen_image_edit",
    "qwen_image_edit_plus",
    "qwen_image_edit_plus_2511",
)
XLABS = {
    f"double_blocks.{{19}}.processor.{name}": shape
    for name, shape in (
        ("qkv_lora1", (9216, 3072)),
        ("qkv_lora2", (9216, 3072)),
        ("proj_lora1", (3072, 3072)),
        ("proj_lora2", (3072, 3072)),
    )
}
PEFT_CONFIG = {
    "lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2 * RANK})
}
FLUX_AROUND = {
    "img_in": (3072, 64),
    "txt_in": (3072, 4096),
    "time_in.in_layer": (3072, 256),
    "vector_in.out_layer": (3072, 3072),
    "guidance_in.in_layer": (3072, 256),
    "final_layer.linear": (64, 3072),
    "final_layer.adaLN_modulation.1": (6144, 3072),
}
OLD_SD15 = {
    name.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.").removesuffix(".0"): shape
    for name, shape in expand(sd15(), "unet.").items()
    if ".attn" in name
}

P, K, L = Dialect.PEFT, Dialect.KOHYA, Dialect.LOKR

LISTINGS: Mapping[str, Listing] = {
    "flux, trainer": Listing(P, "lora_A", expand(flux(19), "transformer."), FLUX),
    "flux, trainer, LoKr": Listing(L, "lokr", expand(flux(19), "transformer."), FLUX),
    "flux, diffusers with alpha": Listing(P, "lora_A", expand(flux(19), "transformer."), FLUX, PEFT_CONFIG),
    "flux, peft": Listing(P, "lora_A.default", expand(flux(19), "base_model.model."), FLUX),
    "flux, ComfyUI": Listing(P, "lora_A", expand(flux_original() | FLUX_AROUND, "diffusion_model."), FLUX),
    "flux, kohya": Listing(
        K, "lora_down, alpha", flat(flux_original(), "lora_unet_") | flat(clip(12, 768), "lora_te1_"), FLUX
    ),
    "flux, kohya, T5": Listing(
        K,
        "lora_down, alpha",
        flat(flux_original(), "lora_unet_")
        | flat(expand({"encoder.block.{24}.layer.0.SelfAttention.q": (4096, 4096)}), "lora_te3_"),
        FLUX,
    ),
    "flux, OneTrainer": Listing(K, "lora_down, alpha", flat(flux(19), "lora_transformer_"), FLUX),
    "flux, LyCORIS": Listing(L, "lokr split", flat(flux(19), "lycoris_"), FLUX),
    "flux, XLabs": Listing(K, ".down", expand(XLABS), (*FLUX, "chroma")),
    "flex1, trainer": Listing(P, "lora_A", expand(flux(8), "transformer."), FLEX),
    "chroma, trainer": Listing(
        P, "lora_A", expand(original(19, 38, 3072, 4, 4), "diffusion_model."), (*FLUX, "chroma")
    ),
    "chroma, kohya": Listing(
        K, "lora_down, alpha", flat(original(19, 38, 3072, 4, 4), "lora_unet_"), (*FLUX, "chroma")
    ),
    "flux2, trainer": Listing(
        P, "lora_A", expand(original(8, 48, 6144, 6, 3), "diffusion_model."), ("flux2", "flux2_diffusers")
    ),
    "klein 4B, trainer": Listing(
        P, "lora_A", expand(original(5, 20, 3072, 6, 3), "diffusion_model."), ("flux2_klein_4b",)
    ),
    "klein 9B, trainer, LoKr": Listing(
        L, "lokr", expand(original(8, 24, 4096, 6, 3), "diffusion_model."), ("flux2_klein_9b",)
    ),
    "klein 9B, LyCORIS": Listing(
        L, "lokr split", flat(original(8, 24, 4096, 6, 3), "lycoris_"), ("flux2_klein_9b",)
    ),
    "klein 4B, kohya": Listing(
        K, "lora_down, alpha", flat(original(5, 20, 3072, 6, 3), "lora_unet_"), ("flux2_klein_4b",)
    ),
    "zimage, trainer": Listing(P, "lora_A", expand(zimage("layers.{30}"), "diffusion_model."), ZIMAGE),
    "zimage, trainer, LoKr": Listing(L, "lokr", expand(zimage("layers.{30}"), "diffusion_model."), ZIMAGE),
    "zimage, kohya": Listing(K, "lora_down, alpha", flat(zimage_fused(), "lora_unet_"), ZIMAGE),
    "zimage, refiners": Listing(
        P, "lora_A", expand(zimage("layers.{30}", "noise_refiner.{2}"), "diffusion_model."), ZIMAGE
    ),
    "qwen, trainer": Listing(P, "lora_A", expand(qwen(), "diffusion_model."), QWEN),
    "qwen, trainer, LoKr": Listing(L, "lokr", expand(qwen(), "diffusion_model."), QWEN),
    "qwen, peft": Listing(P, "lora_A.default", qwen(), QWEN),
    "qwen, kohya": Listing(K, "lora_down, alpha", flat(qwen(), "lora_unet_"), QWEN),
    "lumina2, trainer": Listing(P, "lora_A", expand(lumina2(fused=False), "transformer."), ("lumina2",)),
    "lumina2, ComfyUI": Listing(P, "lora_A", expand(lumina2(fused=True), "diffusion_model."), ("lumina2",)),
    "lumina2, trainer, LoKr": Listing(L, "lokr", expand(lumina2(fused=False), "transformer."), ("lumina2",)),
    "krea2, trainer": Listing(P, "lora_A", expand(krea2(), "diffusion_model."), KREA2),
    "krea2, trainer, LoKr": Listing(L, "lokr", expand(krea2(), "diffusion_model."), KREA2),
    "hidream, trainer": Listing(
        P, "lora_A", expand(hidream(), "diffusion_model."), ("hidream", "hidream_e1")
    ),
    "ltx2, trainer": Listing(P, "lora_A", expand(ltx2(gated=False), "diffusion_model."), ("ltx2", "ltx2.3")),
    "ltx2.3, trainer": Listing(P, "lora_A", expand(ltx2(gated=True), "diffusion_model."), ("ltx2.3",)),
    "ltx2.3, trainer, LoKr": Listing(L, "lokr", expand(ltx2(gated=True), "diffusion_model."), ("ltx2.3",)),
    "ltx2.3, original names": Listing(
        P, "lora_A", expand(ltx2(gated=True) | LTX_2_AROUND, "diffusion_model."), ("ltx2.3",)
    ),
    "h3, trainer": Listing(P, "lora_A", expand(minimax_h3(8), "diffusion_model."), ("minimax_h3",)),
    "h3, musubi-tuner": Listing(
        K, "lora_down, alpha", flat(minimax_h3(2688) | H3_AROUND, "lora_unet_"), ("minimax_h3",)
    ),
    "sd15, trainer": Listing(
        K,
        "lora_down, alpha",
        flat(sd15() | sd15_convolutions(), "lora_unet_") | flat(clip(12, 768), "lora_te_"),
        ("sd15",),
    ),
    "sd15, peft": Listing(P, "lora_A", expand(sd15(), "unet."), ("sd15",)),
    "sd15, older diffusers": Listing(K, "_lora.down", OLD_SD15, ("sd15",)),
    "sdxl, trainer": Listing(K, "lora_down, alpha", flat(sdxl(), "lora_unet_"), ("sdxl",)),
    "sdxl, kohya": Listing(
        K,
        "lora_down, alpha",
        flat(sdxl_original(), "lora_unet_")
        | flat(clip(12, 768), "lora_te1_")
        | flat(clip(32, 1280), "lora_te2_"),
        ("sdxl",),
    ),
}
"""By maker. If several models have the same layers, the names in a file cannot identify the model."""

COUNTS = {
    "flux, trainer": 494,
    "flux, kohya": 376,
    "zimage, trainer": 240,
    "qwen, trainer": 840,
    "krea2, trainer": 256,
    "hidream, trainer": 496,
    "h3, trainer": 258,
    "sd15, peft": 192,
    "sdxl, trainer": 722,
}
"""The known number of modules in such files."""


def bytes_of(header: Header) -> bytes:
    """Return a safetensors file of this header without the weights."""
    entries: dict[str, object] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    position = 0
    for name, tensor in header.tensors.items():
        end = position + 2 * prod(tensor.shape)
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text
