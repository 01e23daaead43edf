from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.failures import FailureCode, JobFailure
from deployments.loras.format.file_modules import judge
from deployments.loras.format.header import read_header

STEM = "base_model.model.model.language_model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {f"{STEM}.lora_A.weight": torch.zeros(4, 8), f"{STEM}.lora_B.weight": torch.zeros(16, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def scale(folder: Path, config: str) -> float | None:
    (folder / "adapter_config.json").write_text(config)
    return judge(read_header(folder / "adapter_model.safetensors")).modules[STEM].scale


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"mlp.up_proj": 6}}, 1.5),
        ({"peft_type": None}, None),
    ],
)
def test_the_alpha_of_the_configuration_beside_the_weights(
    folder: Path, stated: dict[str, Any], expected: float | None
) -> None:
    assert scale(folder, json.dumps(stated)) == expected


def test_a_file_of_another_name_has_no_configuration_beside_it(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"lora_alpha": 8}')
    other = (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    assert judge(read_header(other)).modules[STEM].scale is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"peft_type": "LOHA"}', "LOHA"),
        ('{"peft_type": ["LORA"]}', "LORA"),
        ('{"use_dora": true}', "DoRA"),
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ("\xff", "not valid JSON"),
    ],
)
def test_configurations_that_are_refused(folder: Path, config: str, reason: str) -> None:
    with pytest.raises(JobFailure, match=reason) as caught:
        scale(folder, config)
    assert caught.value.code is FailureCode.LORA_FORMAT_NOT_SUPPORTED
