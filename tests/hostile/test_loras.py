"""Inputs 17 to 33: contents of LoRA files. Inputs 1 to 3: files of another type by name or content."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from deployments.loras.format.header import MAX_HEADER_BYTES, MAX_TENSORS
from tests.hostile.conftest import LORA, QUERY, Stage, request

LAYER = "transformer.single_transformer_blocks.0.attn.to_q"
"""A linear layer of the tiny model with 32 inputs and 32 outputs."""

REFUSED = (400, "LORA_FORMAT_NOT_SUPPORTED")


def header(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entries(**spans: tuple[int, int]) -> bytes:
    """Return a header of float32 tensors that claims these offsets."""
    tensors = {
        name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in spans.items()
    }
    return json.dumps(tensors).encode()


def pair(stem: str = LAYER, rank: int = 2, up_rank: int | None = None, **more: torch.Tensor) -> bytes:
    """Return a LoRA of one module for a layer of 32 x 32."""
    return save(
        {
            f"{stem}.lora_A.weight": torch.full((rank, 32), 0.1),
            f"{stem}.lora_B.weight": torch.full((32, rank if up_rank is None else up_rank), 0.1),
            **{f"{stem}.{name}": tensor for name, tensor in more.items()},
        }
    )


def typed(dtype: torch.dtype) -> bytes:
    return save(
        {
            f"{LAYER}.lora_A.weight": torch.ones(2, 32).to(dtype),
            f"{LAYER}.lora_B.weight": torch.ones(32, 2).to(dtype),
        }
    )


def filled(value: float) -> bytes:
    return save(
        {
            f"{LAYER}.lora_A.weight": torch.full((2, 32), value),
            f"{LAYER}.lora_B.weight": torch.full((32, 2), value),
        }
    )


def archived(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", b"x" * 100)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("data.pkl"))
    return buffer.getvalue()


NO_LORA: dict[str, Callable[[], bytes]] = {
    "2 pickle": lambda: pickle.dumps({"a": 1}, protocol=2),
    "2 pickle of the first protocol": lambda: pickle.dumps({"a": 1}, protocol=0),
    "3 zip": lambda: archived("zip"),
    "3 tar": lambda: archived("tar"),
    "17 nothing": lambda: b"",
    "18 cut in the header": lambda: LORA.read_bytes()[:200],
    "18 cut in the tensors": lambda: LORA.read_bytes()[:-1],
    "18 seven bytes": lambda: LORA.read_bytes()[:7],
    "19 header of 2^63 bytes": lambda: header(b"{}", 2**63),
    "19 header of 2^64-1 bytes": lambda: header(b"{}", 2**64 - 1),
    "20 header of 99 MB": lambda: header(b"{}", 99_000_000),
    "20 header longer than the file": lambda: header(b"{}", MAX_HEADER_BYTES),
    "21 deep JSON": lambda: header(b'{"a":' * 100_000),
    "21 deep lists": lambda: header(b"[" * 100_000),
    "21 duplicate keys": lambda: header(entries(a=(0, 4))[:-1] + b"," + entries(a=(0, 4))[1:], data=b"abcd"),
    "22 overlap": lambda: header(entries(a=(0, 8), b=(4, 12)), data=bytes(12)),
    "22 out of range": lambda: header(entries(a=(0, 400)), data=bytes(4)),
    "22 backwards": lambda: header(entries(a=(8, 4)), data=bytes(8)),
    "22 beyond 2^64": lambda: header(entries(a=(2**70, 2**70 + 4)), data=bytes(8)),
    "22 bytes after the last": lambda: LORA.read_bytes() + b"x",
    "23 very many tensors": lambda: header(entries(**{str(n): (0, 0) for n in range(MAX_TENSORS + 1)})),
    "24 rank 4096": lambda: pair(rank=4096),
    "29 a model": lambda: save({"conv.weight": torch.ones(4)}),
    "31 DoRA": lambda: pair(lora_magnitude_vector=torch.ones(32)),
    "31 LoHa": lambda: save({f"{LAYER}.hada_w1_a": torch.ones(4, 4)}),
    "31 Tucker": lambda: save({f"{LAYER}.lokr_t2": torch.ones(4, 4)}),
}
"""Faults in the header: refused at once if the file is local, else after the download."""


@pytest.mark.parametrize("name", NO_LORA)
def test_what_is_no_lora(stage: Stage, name: str) -> None:
    data = NO_LORA[name]()
    assert stage.refused(request(stage.lora("bad.safetensors", data))) == REFUSED
    before = set(stage.folder.glob("cache/*/*.safetensors"))
    assert stage.outcome(request(stage.site.file("/bad", data) + QUERY)) == REFUSED[1]
    assert set(stage.folder.glob("cache/*/*.safetensors")) == before


WEIGHTS: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "24 rank 0": (lambda: pair(rank=0), "LORA_FORMAT_NOT_SUPPORTED"),
    "24 ranks differ": (lambda: pair(rank=2, up_rank=3), "LORA_FORMAT_NOT_SUPPORTED"),
    "25 NaN": (lambda: filled(float("nan")), "LORA_FORMAT_NOT_SUPPORTED"),
    "25 infinite": (lambda: filled(float("inf")), "LORA_FORMAT_NOT_SUPPORTED"),
    "25 too large to compute with": (lambda: filled(3e38), "OUTPUT_NOT_FINITE"),
    "26 alpha 0": (lambda: pair(alpha=torch.tensor(0.0)), None),
    "26 alpha below 0": (lambda: pair(alpha=torch.tensor(-1.0)), None),
    "26 alpha 1e30": (lambda: pair(alpha=torch.tensor(1e30)), None),
    "26 alpha NaN": (lambda: pair(alpha=torch.tensor(float("nan"))), "LORA_FORMAT_NOT_SUPPORTED"),
    "27 float64": (lambda: typed(torch.float64), None),
    "27 8-bit floats": (lambda: typed(torch.float8_e4m3fn), None),
    "27 8-bit integers": (lambda: typed(torch.int8), "LORA_FORMAT_NOT_SUPPORTED"),
    "27 booleans": (lambda: typed(torch.bool), "LORA_FORMAT_NOT_SUPPORTED"),
    "28 of another model": (lambda: pair("unet.mid_block.attentions.0.proj_in"), "LORA_NO_MATCH"),
    "28 of a larger model": (lambda: _larger(), "LORA_NO_MATCH"),
    "29 no layer of ours": (lambda: pair("transformer.nothing.here"), "LORA_NO_MATCH"),
    "30 the text encoder only": (lambda: _text_encoder(), None),
}
"""Faults that only the weights show, and files that are odd but valid."""


def _larger() -> bytes:
    return save(
        {f"{LAYER}.lora_A.weight": torch.ones(2, 3072), f"{LAYER}.lora_B.weight": torch.ones(3072, 2)}
    )


def _text_encoder() -> bytes:
    return pair("text_encoder.encoder.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(stage: Stage, name: str) -> None:
    make, code = WEIGHTS[name]
    assert stage.outcome(request(stage.site.file(f"/{name.split()[0]}", make()) + QUERY)) == code


OTHER_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "1 .pt": ("weights.pt", lambda file: file.write_bytes(pickle.dumps({}))),
    "1 .ckpt": ("weights.ckpt", lambda file: file.write_bytes(pickle.dumps({}))),
    "1 .bin": ("weights.bin", lambda file: file.write_bytes(b"x")),
    "1 a LoRA without suffix": ("no_suffix", lambda file: file.write_bytes(LORA.read_bytes())),
    "1 a folder": ("folder.safetensors", lambda file: file.mkdir()),
    "1 a pipe": ("pipe.safetensors", os.mkfifo),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_what_is_no_safetensors_file(stage: Stage, name: str) -> None:
    path, make = OTHER_FILES[name]
    make(stage.service.settings.loras / path)
    assert stage.refused(request(path)) == REFUSED


LISTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "32 one LoRA twice": ([{"path": LORA.name}, {"path": LORA.name}], "SINGLE_LORA_ONLY"),
    "32 weights that add up to 0": (
        [{"path": LORA.name, "network_multiplier": 1}, {"path": LORA.name, "network_multiplier": -1}],
        "SINGLE_LORA_ONLY",
    ),
    "33 low without high": ([{"path": LORA.name, "transformer": "low"}], "MOE_FORMAT_NOT_SUPPORTED"),
    "33 high without low": ([{"path": LORA.name, "transformer": "high"}], "MOE_FORMAT_NOT_SUPPORTED"),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_loras(stage: Stage, name: str) -> None:
    loras, code = LISTS[name]
    assert stage.refused(request(loras=loras)) == (400, code)


def test_32_a_lora_of_no_weight(stage: Stage) -> None:
    assert stage.outcome(request(lora={"network_multiplier": 0})) is None
