"""Residency, switching and refusal of adapters on real, tiny pipelines."""

from __future__ import annotations

import gc
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file

from cluster.failures import FailureCode, JobFailure
from deployments.engine.tiny import write_tiny_lora
from deployments.loras.sources.lora_file import LoraFile
from deployments.loras.sources.lora_root import open_lora
from tests.support.studio import Studio, largest_difference

Get = Callable[..., Studio]

LAYER = "transformer.single_transformer_blocks.0.attn.to_q"
"""A linear layer of the tiny FLUX.1 with 32 inputs and 32 outputs."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[LoraFile]:
    folder = tmp_path_factory.mktemp("loras")
    for seed in range(3):
        write_tiny_lora(folder / f"{seed}.safetensors", seed)
    return [open_lora(folder, f"{seed}.safetensors") for seed in range(3)]


def made(folder: Path, tensors: dict[str, torch.Tensor], name: str = "made.safetensors") -> LoraFile:
    save_file(tensors, folder / name)
    return open_lora(folder, name)


def pair(stem: str = LAYER, rank: int = 2, size: int = 32) -> dict[str, torch.Tensor]:
    return {f"{stem}.lora_A.weight": torch.ones(rank, size), f"{stem}.lora_B.weight": torch.ones(size, rank)}


def weights_of(studio: Studio) -> str:
    """Return a digest of every parameter and buffer of the pipeline, with names."""
    digest = hashlib.sha256()
    for component, model in studio.engine._pipeline.components.items():
        if isinstance(model, torch.nn.Module):
            for name, tensor in model.state_dict().items():
                digest.update(f"{component}.{name}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_the_least_recently_used_adapter_goes(new_studio: Get, files: list[LoraFile]) -> None:
    a, b, c = files
    # In memory, weights have the model's float32, whatever the file's dtype.
    size = sum(4 * tensor.numel() for tensor in load_file(a.path).values())
    engine = new_studio("flux", adapter_bytes=2 * size).engine
    engine.use([(a, 1.0)])
    engine.use([(b, 1.0)])
    assert engine.warm == {a.sha256, b.sha256}
    engine.use([(a, 0.5)])
    engine.use([(c, 1.0)])
    assert engine.warm == {a.sha256, c.sha256}


def test_adapters_in_use_are_kept_whatever_their_size(new_studio: Get, files: list[LoraFile]) -> None:
    studio = new_studio("flux", adapter_bytes=0)
    studio.engine.use([(file, 1.0) for file in files])
    assert studio.engine.warm == {file.sha256 for file in files}
    together = studio.picture()
    studio.engine.use([(files[0], 1.0)])
    alone = studio.picture()
    studio.engine.use([(files[1], 1.0)])
    assert studio.engine.warm == {files[1].sha256}
    studio.engine.use([(file, 1.0) for file in files])
    assert np.array_equal(studio.picture(), together)
    assert not np.array_equal(alone, together)


def test_a_switch_to_a_resident_adapter_needs_no_file(new_studio: Get, tmp_path: Path) -> None:
    studio = new_studio("flux")
    for seed in range(2):
        write_tiny_lora(tmp_path / f"{seed}.safetensors", seed)
    a, b = (open_lora(tmp_path, f"{seed}.safetensors") for seed in range(2))
    studio.engine.use([(a, 1.0)])
    first = studio.picture()
    studio.engine.use([(b, 1.0)])
    a.path.unlink()
    b.path.unlink()
    studio.engine.use([(a, 1.0)])
    assert np.array_equal(studio.picture(), first)


def test_dropped_adapters_change_nothing_any_more(new_studio: Get, files: list[LoraFile]) -> None:
    studio = new_studio("flux")
    plain = studio.picture()
    studio.engine.use([(files[0], 1.0)])
    adapted = studio.picture()
    studio.engine.drop_adapters()
    assert studio.engine.warm == frozenset()
    assert np.array_equal(studio.picture(), plain)
    studio.engine.use([(files[0], 1.0)])
    assert np.array_equal(studio.picture(), adapted)


def test_the_same_file_twice_counts_twice(studio: Get, tmp_path: Path) -> None:
    used = studio("flux")
    file = made(tmp_path, {name: tensor / 8 for name, tensor in pair().items()})
    used.engine.use([(file, 0.5), (file, 0.25)])
    twice = used.picture()
    used.engine.use([(file, 0.75)])
    assert largest_difference(twice, used.picture()) <= 1


def test_a_replaced_file_is_another_adapter(studio: Get, tmp_path: Path) -> None:
    used = studio("flux")
    pictures = []
    for seed in range(2):
        write_tiny_lora(tmp_path / "a.safetensors", seed)
        used.engine.use([(open_lora(tmp_path, "a.safetensors"), 1.0)])
        pictures.append(used.picture())
    assert not np.array_equal(*pictures)


def test_a_file_replaced_before_it_is_read_is_not_taken_for_the_first(studio: Get, tmp_path: Path) -> None:
    used = studio("flux")
    file = made(tmp_path, pair())
    made(tmp_path, pair(rank=3))
    with pytest.raises(JobFailure, match="changed") as caught:
        used.engine.use([(file, 1.0)])
    assert (caught.value.code, caught.value.retry) == (FailureCode.LORA_NOT_FOUND, True)
    file.path.unlink()
    with pytest.raises(JobFailure) as caught:
        used.engine.use([(file, 1.0)])
    assert caught.value.code is FailureCode.LORA_NOT_FOUND


def test_some_modules_without_a_layer_are_a_warning(new_studio: Get, tmp_path: Path) -> None:
    engine = new_studio("sdxl").engine
    layer = "lora_unet_mid_block_resnets_0_time_emb_proj"
    shape = engine._pipeline.unet.mid_block.resnets[0].time_emb_proj.weight.shape
    tensors = {
        f"{layer}.lora_down.weight": torch.ones(1, shape[1]),
        f"{layer}.lora_up.weight": torch.ones(shape[0], 1),
    }
    for name in ("lora_unet_nothing", "lora_te1_nothing_here", "lora_te3_nothing"):
        tensors |= {f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.lora_up.weight": torch.ones(8, 1)}
    file = made(tmp_path, tensors)
    for _ in range(2):
        (warning,) = engine.use([(file, 1.0)])
        for words in (
            "1 of 2 in unet",
            "1 of 1 in text_encoder,",
            "1 of 1 in text_encoder_3",
            "lora_te1_nothing_here",
        ):
            assert words in warning
    assert engine.use([]) == []


def broken(**changed: Any) -> dict[str, torch.Tensor]:
    """Return a valid pair with some tensors replaced by suffix; None removes a tensor."""
    tensors = pair() | {
        f"{LAYER}.{suffix.replace('_weight', '.weight')}": value for suffix, value in changed.items()
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


REFUSED = {
    "NaN": (broken(lora_A_weight=torch.full((2, 32), torch.nan)), "infinite or NaN"),
    "infinite": (broken(lora_B_weight=torch.full((32, 2), torch.inf)), "infinite or NaN"),
    "rank mismatch": (broken(lora_B_weight=torch.ones(32, 3)), "do not form a LoRA"),
    "rank 0": (
        broken(lora_A_weight=torch.ones(0, 32), lora_B_weight=torch.ones(32, 0)),
        "do not form a LoRA",
    ),
    "one dimension": (broken(lora_A_weight=torch.ones(32)), "do not form a LoRA"),
    "three dimensions": (broken(lora_A_weight=torch.ones(2, 4, 8)), "do not form a LoRA"),
    "integers": (broken(lora_A_weight=torch.ones(2, 32, dtype=torch.int8)), "not floating-point"),
    "no up": (broken(lora_B_weight=None), "incomplete"),
    "alpha of two": (broken(alpha=torch.ones(2)), "alpha"),
    "alpha NaN": (broken(alpha=torch.tensor(torch.nan)), "alpha"),
    "LoRA and LoKr": (broken(lokr_w1=torch.ones(2, 2), lokr_w2=torch.ones(16, 16)), "incomplete"),
    "half a LoKr": ({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, "incomplete"),
    "LoKr factors": (
        {
            f"{LAYER}.lokr_w1": torch.ones(2, 2),
            f"{LAYER}.lokr_w2_a": torch.ones(16, 3),
            f"{LAYER}.lokr_w2_b": torch.ones(2, 16),
        },
        "incomplete",
    ),
    "LoKr of three dimensions": (
        {f"{LAYER}.lokr_w1": torch.ones(2, 2, 1), f"{LAYER}.lokr_w2": torch.ones(16, 16)},
        "LoKr factor of shape",
    ),
    "twice": (pair() | pair(LAYER.replace("transformer.", "lora_unet_", 1).replace(".", "_")), "twice"),
    "roles twice": (pair() | {f"{LAYER}.lora_A.other.weight": torch.ones(2, 32)}, "duplicate or unknown"),
    "DoRA": (broken(magnitude=torch.ones(32)), "DoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_files_leave_everything_as_it_was(
    studio: Get, files: list[LoraFile], tmp_path: Path, kind: str
) -> None:
    tensors, words = REFUSED[kind]
    check_refused(
        studio("flux"), files[0], made(tmp_path, tensors), FailureCode.LORA_FORMAT_NOT_SUPPORTED, words
    )


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (pair("transformer.nothing.of.this.kind"), "matches no layer"),
        (pair("lora_unet_down_blocks_0_attentions_0_proj_in"), "matches no layer"),
        (pair(size=64), "another model"),
        (
            {
                f"{LAYER}.lora_A.weight": torch.ones(2, 32, 1, 1),
                f"{LAYER}.lora_B.weight": torch.ones(32, 2, 1, 1),
            },
            "another",
        ),
        ({f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2": torch.ones(8, 8)}, "another model"),
    ],
)
def test_files_for_another_model(
    studio: Get, files: list[LoraFile], tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    check_refused(studio("flux"), files[0], made(tmp_path, tensors), FailureCode.LORA_NO_MATCH, words)


def check_refused(used: Studio, active: LoraFile, refused: LoraFile, code: FailureCode, words: str) -> None:
    used.engine.use([(active, 1.0)])
    picture, weights, warm = used.picture(), weights_of(used), used.engine.warm
    with pytest.raises(JobFailure, match=words) as caught:
        used.engine.use([(active, 0.5), (refused, 1.0)])
    assert caught.value.code is code
    assert (weights_of(used), used.engine.warm) == (weights, warm)
    assert np.array_equal(used.picture(), picture)


@pytest.mark.parametrize("model", ["flux", "sdxl", "flux2_klein_4b"])
def test_base_weights_survive_any_sequence_of_switches(new_studio: Get, tmp_path: Path, model: str) -> None:
    """Random dialects, ranks, LoKr and multipliers, one or two at a time, with refused files in between."""
    studio = new_studio(model, adapter_bytes=BUDGET, host_adapter_bytes=0)
    weights, plain, held = weights_of(studio), studio.picture(), held_bytes()
    modules = [[name for name, _ in part.named_modules()] for part in models_of(studio)]
    choice = random.Random(7)
    usable = [open_lora(studio.loras, name) for name in studio.names]
    usable += [
        made(tmp_path, small_copy(file, rank), f"{rank}-{file.path.name}")
        for file in usable
        for rank in (1, 3)
    ]
    usable += [
        made(tmp_path, tensors, f"{name}.safetensors") for name, tensors in OTHER_DIALECTS[model].items()
    ]
    useless = made(tmp_path, pair("transformer.nothing"))
    for turn in range(200):
        chosen = [(file, choice.uniform(-2, 2)) for file in choice.sample(usable, choice.randint(0, 2))]
        studio.engine.use(chosen)
        if choice.random() < 0.1:
            with pytest.raises(JobFailure):
                studio.engine.use([*chosen, (useless, 1.0)])
        if choice.random() < 0.02:
            studio.picture()
        if turn % 50 == 49:
            in_use = sum(2 * file.bytes for file, _ in chosen)  # float16 in the file, float32 here.
            assert held_bytes() <= held + BUDGET + in_use + SLACK
    studio.engine.use([])
    assert np.array_equal(studio.picture(), plain)
    assert weights_of(studio) == weights
    assert [[name for name, _ in part.named_modules()] for part in models_of(studio)] == modules
    assert all(len(module._forward_hooks) <= 1 for part in models_of(studio) for module in part.modules())
    studio.engine.drop_adapters()
    assert held_bytes() <= held + SLACK


BUDGET, SLACK = 200_000, 2_000
"""Bytes of adapters that may stay resident; bytes of small things such as schedules."""


def held_bytes() -> int:
    """Return the bytes of all live tensors."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def lokr(stem: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    w1, w2 = torch.ones(4, 4) / 8, torch.ones(outputs // 4, inputs // 4) / 8
    return {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(torch.inf)}


def kohya(stem: str, outputs: int, inputs: int, rank: int = 5) -> dict[str, torch.Tensor]:
    down, up = torch.ones(rank, inputs) / 8, torch.ones(outputs, rank) / 8
    return {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.tensor(2.0),
    }


OTHER_DIALECTS = {
    "flux": {
        "lokr": lokr("transformer.single_transformer_blocks.0.attn.to_q", 32, 32),
        "lycoris": lokr("lycoris_single_blocks_1_linear1", 224, 32),
        "kohya": kohya("lora_unet_double_blocks_0_img_attn_qkv", 96, 32),
    },
    "sdxl": {
        "kohya": kohya("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", 32, 32),
        "lokr": lokr("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 32, 32),
    },
    "flux2_klein_4b": {
        "lokr": lokr("diffusion_model.double_blocks.0.txt_attn.qkv", 96, 32),
        "kohya": kohya("lora_unet_double_blocks_1_img_attn_proj", 32, 32),
    },
}


def test_a_load_leaves_the_models_where_they_are(new_studio: Get) -> None:
    """With sequential offload, weights are on the device only while their layer runs."""
    studio = new_studio("flux")
    loras = {studio.names[0]: 1.0}
    plain, adapted = studio.render({}), studio.render(loras)
    studio.engine.drop_adapters()
    transformer = studio.engine._pipeline.transformer
    cpu_offload(transformer, torch.device("cpu"))
    placement = placement_of(transformer)
    assert torch.device("meta") in placement["devices"]
    for _ in range(2):
        assert np.array_equal(studio.render(loras), adapted)
        assert np.array_equal(studio.render({}), plain)
    assert placement_of(transformer) == placement


def placement_of(model: torch.nn.Module) -> dict[str, list[object]]:
    return {
        "devices": [parameter.device for parameter in model.parameters()],
        "hooks": [getattr(module, "_hf_hook", None) for module in model.modules()],
    }


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"transformer.lora_alpha": 4}, 2.0),
        ({"lora_alpha": 1}, 0.5),
        ({"transformer.lora_alpha": 4, "transformer.use_rslora": True}, 4 / 2**0.5),
        ({"transformer.lora_alpha": 9, "transformer.alpha_pattern": {"attn.to_q": 1}}, 0.5),
        ({"text_encoder.lora_alpha": 9}, 1.0),
        ({"transformer.lora_alpha": "many", "transformer.r": 8}, 1.0),
    ],
)
def test_the_alpha_of_peft_s_metadata(
    studio: Get, tmp_path: Path, config: dict[str, object], scale: float
) -> None:
    used = studio("flux")
    tensors = {name: tensor / 8 for name, tensor in pair().items()}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    used.engine.use([(open_lora(tmp_path, "a.safetensors"), 0.5)])
    stated = used.picture()
    used.engine.use([(made(tmp_path, tensors), 0.5 * scale)])
    assert np.array_equal(used.picture(), stated)


@pytest.mark.parametrize("text", ["{", "[]", '{"transformer.use_dora": true}', '{"use_dora": true}'])
def test_metadata_of_peft_that_are_refused(studio: Get, tmp_path: Path, text: str) -> None:
    save_file(pair(), tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(JobFailure) as caught:
        studio("flux").engine.use([(open_lora(tmp_path, "a.safetensors"), 1.0)])
    assert caught.value.code is FailureCode.LORA_FORMAT_NOT_SUPPORTED


def models_of(studio: Studio) -> list[torch.nn.Module]:
    parts = studio.engine._pipeline.components.values()
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def small_copy(file: LoraFile, rank: int) -> dict[str, torch.Tensor]:
    """Return a file's tensors at another rank: rows of the down and columns of the up matrices repeated."""
    tensors = load_file(file.path)
    for name, tensor in tensors.items():
        if name.endswith((".lora_A.weight", ".lora_down.weight")):
            tensors[name] = tensor[:1].repeat_interleave(rank, 0)
        elif name.endswith((".lora_B.weight", ".lora_up.weight")):
            tensors[name] = tensor[:, :1].repeat_interleave(rank, 1)
    return tensors
