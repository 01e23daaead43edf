"""Inspection from the header alone: every module of every maker's files matches the right models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.failures import FailureCode, JobFailure
from deployments.catalog import CATALOG
from deployments.loras.format.header import Header, TensorInfo
from deployments.loras.format.inspection import Fit, inspect, inspect_file
from tests.deployments.loras.format.listings import COUNTS, LISTINGS, RANK
from tests.parity.cases import FOLDER


@pytest.mark.parametrize("name", LISTINGS)
def test_every_module_of_a_real_file_is_found(name: str) -> None:
    listing = LISTINGS[name]
    found = inspect(listing.header())
    assert (found.dialect, found.modules) == (listing.dialect, len(listing.modules))
    assert found.modules == COUNTS.get(name, found.modules)
    assert set(found.fitting_models) == set(listing.models)
    for entry in found.models:
        whole = entry.model in listing.models
        assert (entry.fit is Fit.WHOLE) == whole, entry
        if whole:
            assert (entry.matched, entry.unmatched, entry.misfits, entry.examples) == (
                found.modules,
                0,
                0,
                [],
            )
    assert found.ranks == ([] if listing.form == "lokr" else [RANK])
    assert found.alpha_tensors == (found.modules if "alpha" in listing.form or "lokr" in listing.form else 0)
    assert found.alphas == ([2 * RANK] if listing.metadata else [])


def test_all_models_are_judged_in_their_order() -> None:
    found = inspect(LISTINGS["flux, trainer"].header())
    assert [entry.model for entry in found.models] == list(CATALOG)


def test_a_file_that_fits_no_model_whole_is_for_those_that_most_of_it_fits() -> None:
    listing = LISTINGS["flux, trainer"]
    header = listing.header()
    strange = {f"transformer.nothing.lora_{name}.weight": TensorInfo("F16", (1, 1)) for name in "AB"}
    found = inspect(Header({**header.tensors, **strange}, {}))
    assert set(found.fitting_models) == {"flux", "flux_kontext"}
    fits = {entry.model: entry for entry in found.models}
    assert fits["flux"].fit is Fit.PART
    assert (fits["flux"].matched, fits["flux"].unmatched) == (494, 1)
    assert fits["flux"].examples == ["'transformer.nothing'"]
    # Eleven blocks fewer, with fourteen modules each.
    assert (fits["flex1"].fit, fits["flex1"].unmatched) == (Fit.PART, 155)
    assert found.dtypes == {"BF16": 988, "F16": 2}


def test_layers_of_other_sizes_are_misfits() -> None:
    found = inspect(LISTINGS["klein 4B, trainer"].header())
    others = {entry.model: entry for entry in found.models}
    assert others["flux2_klein_9b"].fit is Fit.NONE
    assert others["flux2_klein_9b"].misfits == found.modules
    # Attention has FLUX.1's size; the gated MLPs do not.
    assert (others["flux"].fit, others["flux"].matched, others["flux"].misfits) == (Fit.NONE, 20, 60)


def test_a_layer_that_is_named_twice_is_a_misfit() -> None:
    header = LISTINGS["zimage, trainer"].header()
    fused = LISTINGS["zimage, kohya"].header()
    found = inspect(Header({**header.tensors, **fused.tensors}, {}))
    assert found.fitting_models == []


def test_a_file_of_the_trainer_and_its_alphas() -> None:
    found = inspect_file(FOLDER / "sd15" / "lora" / "style_b.safetensors")
    assert (found.ranks, found.alphas) == ([2], [1.0, 2.0])
    assert "ai-toolkit" in found.metadata["software"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_alphas_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a.lora_down.weight": torch.ones(2, 4), "a.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors | {"a.alpha": torch.tensor(1.5, dtype=dtype)}, tmp_path / "a.safetensors")
    assert inspect_file(tmp_path / "a.safetensors").alphas == [1.5]
    save_file(tensors | {"a.alpha": torch.tensor(math.inf, dtype=dtype)}, tmp_path / "b.safetensors")
    assert inspect_file(tmp_path / "b.safetensors").alphas == []


def test_metadata_are_bounded() -> None:
    header = LISTINGS["flux, XLabs"].header()
    metadata = {f"ss_{index:03}": "x" * 10_000 for index in range(500)} | {"a" * 10_000: "first"}
    found = inspect(Header(header.tensors, metadata)).metadata
    assert len(found) == 64
    assert sum(len(name) + len(text) for name, text in found.items()) < 64 * 520
    assert found["ss_000"] == "x" * 500 + "..."


def test_what_no_model_serves_is_refused() -> None:
    header = LISTINGS["flux, trainer"].header()
    dora = {"transformer.transformer_blocks.0.attn.to_q.magnitude": TensorInfo("F16", (3072,))}
    with pytest.raises(JobFailure, match="DoRA") as caught:
        inspect(Header({**header.tensors, **dora}, {}))
    assert caught.value.code is FailureCode.LORA_FORMAT_NOT_SUPPORTED


def test_factors_that_would_become_far_larger_than_their_file_are_refused() -> None:
    def lokr(side: int) -> Header:
        stem = "diffusion_model.double_blocks.0.img_attn.proj"
        shapes = {"lokr_w1": (1, 1), "lokr_w2_a": (side, 1), "lokr_w2_b": (1, side)}
        return Header({f"{stem}.{name}": TensorInfo("F16", shape) for name, shape in shapes.items()}, {})

    inspect(lokr(3072))
    with pytest.raises(JobFailure, match="larger than the file") as caught:
        inspect(lokr(50_000))
    assert caught.value.code is FailureCode.LORA_FORMAT_NOT_SUPPORTED
