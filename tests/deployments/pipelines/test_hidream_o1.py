"""HiDream-O1's transformer and loop against the trainer's numbers, beyond what golden pictures cover."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from deployments.engine.loading import Loader
from deployments.engine.tiny import materialize
from deployments.loras.sources.lora_root import open_lora
from deployments.pipelines.hidream_o1 import (
    NOISE_SCALE,
    PixelTransformer,
    _positions,
    to_patches,
    to_pixels,
)
from tests.parity.cases import FOLDER
from tests.support.studio import Studio

GOLDEN = FOLDER / "hidream_o1"
TRAIN = json.loads((GOLDEN / "train.json").read_text())
ROWS, COLUMNS = TRAIN["height"] // 32, TRAIN["width"] // 32


def test_a_picture_of_the_trainer_is_predicted(studio: Callable[[str], Studio]) -> None:
    used = studio("hidream_o1")
    pipeline = used.engine._pipeline
    ids = pipeline._tokenize(TRAIN["caption"])
    assert ids.tolist() == [TRAIN["input_ids"]]
    used.engine.use([(open_lora(used.loras, "peft_a"), 1.0)])
    clean, noise = (torch.from_numpy(np.load(GOLDEN / f"train_{name}.npy")) for name in ("x0", "eps"))
    for case, eps in zip(TRAIN["cases"], noise.unflatten(0, (3, -1)), strict=True):
        noisy = (1 - case["sigma"]) * clean + case["sigma"] * NOISE_SCALE * eps
        with torch.inference_mode(), used.engine._loaded_adapters.rendering():
            predicted = pipeline.transformer(ids, noisy, torch.tensor(1 - case["sigma"]), ROWS)
        assert (predicted - clean).square().mean().item() == pytest.approx(case["loss"], rel=1e-5)
        if case["sigma"] == 0.5:
            expected = torch.from_numpy(np.load(GOLDEN / "train_x_pred_sigma05.npy"))
            assert torch.allclose(predicted, expected, atol=1e-4)


def test_patches_lie_as_the_trainer_s() -> None:
    with Image.open(GOLDEN / "train_image.png") as image:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32))
    pixels = (pixels / 127.5 - 1).permute(2, 0, 1)[None]
    patches = to_patches(pixels)
    assert torch.allclose(patches, torch.from_numpy(np.load(GOLDEN / "train_x0.npy")), atol=1e-6)
    assert torch.equal(to_pixels(patches, ROWS), pixels)


@pytest.mark.parametrize("text", [10, len(TRAIN["input_ids"]), 5000])
def test_patches_begin_at_one_position_whatever_the_text(text: int) -> None:
    positions = _positions(text, ROWS, COLUMNS)
    assert positions[:, 0, text - 1].tolist() == [text - 1] * 3
    assert positions[:, 0, text].tolist() == TRAIN["position_ids_first_image_token"]
    assert positions[:, 0, -1].tolist() == TRAIN["position_ids_last"]


def test_the_text_does_not_see_the_picture(studio: Callable[[str], Studio]) -> None:
    transformer = studio("hidream_o1").engine._pipeline.transformer
    seen: list[torch.Tensor] = []
    hook = transformer.model.language_model.register_forward_hook(
        lambda _module, _args, output: seen.append(output.last_hidden_state)
    )
    ids = torch.tensor([TRAIN["input_ids"]])
    with torch.inference_mode():
        for patches in (torch.zeros(1, 6, 3072), torch.ones(1, 6, 3072)):
            transformer(ids, patches, torch.tensor(0.5), ROWS)
    hook.remove()
    time = ids.shape[1] - 1
    assert torch.equal(seen[0][:, :time], seen[1][:, :time])
    assert not torch.allclose(seen[0][:, time], seen[1][:, time])


def test_the_shift_acts_twice_at_the_low_end(studio: Callable[[str], Studio]) -> None:
    used = studio("hidream_o1")
    used.picture(steps=4)
    times = used.engine._pipeline.scheduler.timesteps.tolist()
    assert times == pytest.approx([1000, 857.69, 602.15, 8.93], abs=0.01)


def test_in_bfloat16_the_picture_is_rounded_at_each_step_and_the_step_is_not(
    new_studio: Callable[[str], Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loader, "dtype", torch.bfloat16)
    used, seen = new_studio("hidream_o1"), []
    scheduler = used.engine._pipeline.scheduler
    step = scheduler.step

    def watch(velocity: torch.Tensor, time: torch.Tensor, state: torch.Tensor, **options: object) -> object:
        seen.append((velocity.dtype, state.dtype, torch.equal(state, state.bfloat16().float())))
        return step(velocity, time, state, **options)

    monkeypatch.setattr(scheduler, "step", watch)
    used.picture(steps=2)
    assert seen == [(torch.float32, torch.float32, True)] * 2


def test_of_a_whole_checkpoint_what_draws_is_loaded(studio: Callable[[str], Studio], tmp_path: Path) -> None:
    """The real checkpoint is a Qwen3-VL with a vision tower and `lm_head`, plus O1's own tensors."""
    materialize(GOLDEN / "checkpoint", tmp_path, Qwen3VLForConditionalGeneration)
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"not HiDream-O1: it lacks model\.final_layer2"):
        PixelTransformer.from_pretrained(tmp_path)
    drawing = studio("hidream_o1").engine._pipeline.transformer.state_dict()
    save_file(load_file(file) | drawing, file, metadata={"format": "pt"})
    loaded = PixelTransformer.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == drawing.keys()
    assert all(torch.equal(loaded[name], drawing[name]) for name in drawing)
