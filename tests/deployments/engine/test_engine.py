from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.failures import FailureCode, JobFailure
from deployments.catalog import CATALOG
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.engine import Engine
from deployments.engine.offload import OFFLOADS
from deployments.engine.tiny import TINY_FLUX, materialize
from tests.parity.cases import MODELS
from tests.support.studio import Studio

Get = Callable[..., Studio]

SD15 = "stable-diffusion-v1-5--stable-diffusion-v1-5"


@pytest.mark.parametrize("model", MODELS)
def test_every_part_is_float32_on_the_cpu(studio: Get, model: str) -> None:
    """Left alone, transformers would use the bfloat16 and float16 of the configs."""
    used = studio(model)
    used.render({used.names[0]: 1.0})
    for part in used.engine._pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            assert {tensor.dtype for tensor in part.parameters()} == {torch.float32}


def test_a_description_is_json_and_names_what_rendered(studio: Get) -> None:
    description = json.loads(json.dumps(studio("flux").engine.describe()))
    assert description["model"] == "flux"
    assert (description["checkpoint"], description["revision"]) == ("black-forest-labs/FLUX.1-dev", "local")
    assert (description["device"], description["dtype"], description["offload"]) == ("cpu", "float32", "none")
    assert description["versions"]["torch"] == torch.__version__


def test_a_description_names_the_parts_from_elsewhere(studio: Get) -> None:
    description = studio("flux2").engine.describe()
    assert description["checkpoint"] == "black-forest-labs/FLUX.2-dev"
    mistral = "mistralai/Mistral-Small-3.1-24B-Instruct-2503@local"
    assert description["parts"] == {"text_encoder": mistral, "tokenizer": mistral}


def test_a_sound_device_passes_the_probe(studio: Get) -> None:
    studio("flux").engine.probe()


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_does_nothing_on_the_cpu(studio: Get, checkpoints: Path, offload: str) -> None:
    engine = Engine(CATALOG["sd15"], Checkpoints(checkpoints, None), device="cpu", offload=offload)
    engine.load()
    assert np.array_equal(Studio(engine).render({}), studio("sd15").render({}))


def test_an_unknown_offload_is_refused(checkpoints: Path) -> None:
    with pytest.raises(ValueError, match="none, text, model, group, sequential"):
        Engine(CATALOG["sd15"], Checkpoints(checkpoints, None), device="cpu", offload="disk")


def test_a_missing_checkpoint_fails_the_load(tmp_path: Path) -> None:
    engine = Engine(CATALOG["flux"], Checkpoints(tmp_path, None), device="cpu")
    with pytest.raises(JobFailure, match=r"FLUX\.1-dev") as caught:
        engine.load()
    assert caught.value.code is FailureCode.MODEL_LOAD_FAILED
    assert engine.warm == frozenset()


def test_files_of_the_variant_are_loaded_where_there_are_some(
    studio: Get, checkpoints: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints / SD15, tmp_path / SD15)
    for file in (folder / "unet", folder / "vae", folder / "text_encoder"):
        weights = next(file.glob("*.safetensors"))
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    engine = Engine(CATALOG["sd15"], Checkpoints(tmp_path, None), device="cpu")
    engine.load()
    assert np.array_equal(Studio(engine).render({}), studio("sd15").render({}))


def test_the_safety_checker_of_the_real_repository_is_not_loaded(checkpoints: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints / SD15, tmp_path / SD15)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    engine = Engine(CATALOG["sd15"], Checkpoints(tmp_path, None), device="cpu")
    engine.load()
    assert Studio(engine).render({}).any()


def test_pickled_weights_are_never_loaded(checkpoints: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints / SD15, tmp_path / SD15)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    engine = Engine(CATALOG["sd15"], Checkpoints(tmp_path, None), device="cpu")
    with pytest.raises(OSError, match="safetensors"):
        engine.load()


def test_a_chat_template_may_lie_in_the_processor_s_file(
    studio: Get, checkpoints: Path, tmp_path: Path
) -> None:
    mirror = tmp_path / "mirror"
    flux2, mistral = "black-forest-labs--FLUX.2-dev", "mistralai--Mistral-Small-3.1-24B-Instruct-2503"
    for folder in (flux2, mistral):
        shutil.copytree(checkpoints / folder, mirror / folder)
    template = mirror / mistral / "chat_template.jinja"
    template.with_suffix(".json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    engine = Engine(CATALOG["flux2"], Checkpoints(mirror, None), device="cpu")
    engine.load()
    assert np.array_equal(Studio(engine).render({}), studio("flux2").render({}))


def test_models_without_control_images_ignore_them(studio: Get) -> None:
    used = studio("flux")
    assert np.array_equal(used.render({}, controls=[Image.new("RGB", (8, 8))]), used.render({}))


def test_loading_makes_no_second_copy(tmp_path: Path) -> None:
    """Weights are memory-mapped: 220 MiB of them add little to the process's own memory."""
    source = tmp_path / "source"
    shutil.copytree(TINY_FLUX, source)
    config = source / "text_encoder_2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "d_ff": 300_000}))
    target = tmp_path / "checkpoints" / "black-forest-labs--FLUX.1-dev"
    materialize(source, target)
    weights = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(target.parent)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 0.3 * weights


GROWTH = """
import resource, sys
from pathlib import Path
from diffusers import FluxPipeline
from transformers import CLIPTextModel, T5EncoderModel
from deployments.catalog import CATALOG
from deployments.engine.checkpoints import Checkpoints
from deployments.engine.engine import Engine

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
Engine(CATALOG["flux"], Checkpoints(Path(sys.argv[1]), None), device="cpu").load()
print(peak() - before)
"""
