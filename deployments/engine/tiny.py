"""Tiny checkpoints with made-up weights: a real pipeline end to end without a GPU, a hub or an account.

The demo and the parity tests use the same mechanism. Configs and tokenizers are files. Weights are generated
from their names, so nothing is stored and everyone gets the same model.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils.constants import SAFETENSORS_WEIGHTS_NAME as DIFFUSERS_WEIGHTS
from safetensors.torch import save_file, save_model
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME as TRANSFORMERS_WEIGHTS

from deployments.catalog.lazy import Lazy

TINY_FLUX = Path(__file__).parent / "tiny_flux"
"""Configs and tokenizers of a FLUX.1 with two double and two single blocks, 32 wide."""

_RANK = 4

_MODULES = {
    "OmniGen2Transformer2DModel": "deployments.pipelines.omnigen2_transformer",
    "LTX2LatentUpsamplerModel": "diffusers.pipelines.ltx2.latent_upsampler",
}
"""Modules of classes that configs name but that no library exports at its top level."""


def materialize(source: Path, target: Path, model_class: type[PreTrainedModel] | None = None) -> None:
    """Write a checkpoint in diffusers layout, float32 safetensors, from a checkpoint without weights.

    `source` holds `model_index.json` and a folder per component, or only component folders, each with a
    `config.json`. `model_class` overrides the class that the configs name. The global random state is
    unchanged.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    index = source / "model_index.json"
    entries = json.loads(index.read_text()) if index.exists() else {}
    # Schedulers and tokenizers have no config.json and no weights.
    for file in sorted(source.rglob("config.json")):
        library, class_name = entries.get(file.parent.name) or _class_of(json.loads(file.read_text()))
        component_class = (
            model_class or _find_class(library, class_name) or Lazy(_MODULES[class_name], class_name).load()
        )
        _materialize_component(component_class, target / file.parent.relative_to(source))


def write_tiny_checkpoints(target: Path) -> None:
    """Write tiny versions of FLUX.1-dev and FLUX.1-Kontext-dev as `org--name` folders below `target`."""
    for name, pipeline in (("FLUX.1-dev", "FluxPipeline"), ("FLUX.1-Kontext-dev", "FluxKontextPipeline")):
        folder = target / f"black-forest-labs--{name}"
        materialize(TINY_FLUX, folder)
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": pipeline}, indent=2))


def write_tiny_lora(path: Path, seed: int) -> None:
    """Write a LoRA of rank 4 for the tiny FLUX.1, bfloat16, in the trainer's key format."""
    config = json.loads((TINY_FLUX / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**{key: config[key] for key in config if key[0] != "_"})
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name:
            down = torch.randn(_RANK, module.in_features, generator=generator) / math.sqrt(module.in_features)
            up = torch.randn(module.out_features, _RANK, generator=generator) / math.sqrt(_RANK)
            tensors[f"transformer.{name}.lora_A.weight"] = down.bfloat16()
            tensors[f"transformer.{name}.lora_B.weight"] = up.bfloat16()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Only one metadata entry: safetensors writes several in no fixed order, and the file must hash the same.
    save_file(tensors, path, metadata={"ss_base_model_version": "flux.1"})


def _find_class(library: str, class_name: str) -> Any:  # noqa: ANN401 - a class or None
    """Return a class of a library or, in diffusers, of a pipeline's folder; None if there is none."""
    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    return getattr(module or getattr(diffusers.pipelines, library, None), class_name, None)


def _class_of(config: dict[str, Any]) -> tuple[str, str]:
    if "_class_name" in config:
        return "diffusers", config["_class_name"]
    return "transformers", config["architectures"][0]


def _materialize_component(model_class: Any, folder: Path) -> None:  # noqa: ANN401
    with torch.random.fork_rng(devices=[]):
        if issubclass(model_class, PreTrainedModel):
            config_class: Any = model_class.config_class
            config = config_class.from_pretrained(folder, dtype=torch.float32)
            component, file = model_class(config), TRANSFORMERS_WEIGHTS
        else:
            component, file = model_class.from_config(model_class.load_config(folder)), DIFFUSERS_WEIGHTS
    _fill_weights(component)
    save_model(component, str(folder / file), metadata={"format": "pt"})


@torch.no_grad()
def _fill_weights(model: torch.nn.Module) -> None:
    """Replace every floating-point parameter, in place, by numbers that depend only on its name.

    With `r` standard normal, seeded by the crc32 of the name: `r / sqrt(fan_in)` for two or more dimensions,
    `1 + 0.1 r` for scales, `0.1 r` for the rest. A tied parameter takes the values of its first name.
    """
    done: set[int] = set()
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_floating_point() or id(parameter) in done:
            continue
        done.add(id(parameter))
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.dim() >= 2:
            values /= math.sqrt(math.prod(parameter.shape[1:]))
        else:
            values *= 0.1
            if name.endswith(("weight", "gamma", "scale")):
                values += 1
        parameter.copy_(values)
