"""Dialects of LoRA files, detected from tensor names alone: these files have no weights."""

from __future__ import annotations

import pytest

from cluster.failures import FailureCode, JobFailure
from deployments.loras.format.dialects import Dialect, Role, dialect_of, split
from deployments.loras.format.header import Header, TensorInfo, read_header
from tests.parity.cases import FOLDER


def header(*names: str) -> Header:
    return Header({name: TensorInfo("F16", (4, 4)) for name in names}, {})


PAIR = ("transformer.a.lora_A.weight", "transformer.a.lora_B.weight")


@pytest.mark.parametrize(
    ("names", "dialect"),
    [
        (PAIR, Dialect.PEFT),
        (
            ("base_model.model.a.lora_A.default.weight", "base_model.model.a.lora_B.default.weight"),
            Dialect.PEFT,
        ),
        (("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"), Dialect.KOHYA),
        (("unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q_lora.up.weight"), Dialect.KOHYA),
        (
            ("text_encoder.a.lora_linear_layer.down.weight", "text_encoder.a.lora_linear_layer.up.weight"),
            Dialect.KOHYA,
        ),
        (
            (
                "double_blocks.0.processor.qkv_lora1.down.weight",
                "double_blocks.0.processor.qkv_lora1.up.weight",
            ),
            Dialect.KOHYA,
        ),
        (("diffusion_model.a.lokr_w1", "diffusion_model.a.lokr_w2", "diffusion_model.a.alpha"), Dialect.LOKR),
        (("lycoris_a.lokr_w1_a", "lycoris_a.lokr_w1_b", "lycoris_a.lokr_w2"), Dialect.LOKR),
    ],
)
def test_dialects(names: tuple[str, ...], dialect: Dialect) -> None:
    assert dialect_of(header(*names)) is dialect


@pytest.mark.parametrize(
    ("model", "dialect"),
    [("flux", Dialect.PEFT), ("zimage", Dialect.PEFT), ("sd15", Dialect.KOHYA), ("sdxl", Dialect.KOHYA)],
)
def test_files_of_the_trainer(model: str, dialect: Dialect) -> None:
    for path in (FOLDER / model / "lora").iterdir():
        assert dialect_of(read_header(path)) is dialect


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((*PAIR, "transformer.a.magnitude"), "DoRA"),
        ((*PAIR, "transformer.a.lora_magnitude_vector"), "DoRA"),
        (("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.dora_scale"), "DoRA"),
        (("lora_unet_a.hada_w1_a", "lora_unet_a.hada_w1_b", "lora_unet_a.alpha"), "LoHa"),
        (
            ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.lora_mid.weight"),
            "Tucker",
        ),
        (("lora_unet_a.oft_blocks",), "OFT"),
        ((*PAIR, "transformer.norm.diff_b"), "whole layers"),
        ((*PAIR, "transformer.norm.weight"), "not part of a LoRA"),
        (("unet.conv_in.weight", "unet.conv_in.bias"), "no LoRA tensors"),
        (("lora_unet_a.alpha",), "no LoRA tensors"),
        ((), "no LoRA tensors"),
    ],
)
def test_refused_files(names: tuple[str, ...], words: str) -> None:
    with pytest.raises(JobFailure, match=words) as caught:
        dialect_of(header(*names))
    assert caught.value.code is FailureCode.LORA_FORMAT_NOT_SUPPORTED


def test_a_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(JobFailure) as caught:
        dialect_of(header("x" * 100_000))
    assert len(caught.value.message) < 300


def test_split() -> None:
    assert split("a.b.lora_down.weight") == ("a.b", Role.DOWN, Dialect.KOHYA)
    assert split("a.b.attn.to_q_lora.up.weight") == ("a.b.attn.to_q", Role.UP, Dialect.KOHYA)
    assert split("a.alpha") == ("a", Role.ALPHA, None)
    assert split("a.weight") is None
