"""The golden cases: requests, expected pictures, and the tiny checkpoints that render them.

Each model id has a folder: `cases.json`, `preview.json` (requests with that `sampling`), `*.npy` (uint8,
H x W x 3 or F x H x W x 3, before any encoding), `*.audio.npy` (int16 [channels, samples], rounded from
32767 times the samples), `lora/` as LoRA root, `repos.json` from repository to the folder (or folders, put
together) with its configs and tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.engine.videos import Sound

FOLDER = Path(__file__).parent

MODELS = tuple(sorted(file.parent.name for file in FOLDER.glob("*/cases.json")))

SLOW = frozenset({"hidream"})
"""Ids that always draw a megapixel, whatever the request says: a picture takes seconds."""


def each(models: Iterable[str]) -> list[Any]:
    """Return test parameters, one per id; tests of slow ids are marked slow."""
    return [pytest.param(model, marks=pytest.mark.slow) if model in SLOW else model for model in models]


SOUND_MAX_ABS = {"ltx2.3": 128}
"""Wider than `cases.json` says: the tiny vocoder saturates, and makes much of last bits, which CPUs decide.
Plain diffusers differs from these goldens by 24 to 40, on one machine, by the threads and instructions used.
"""


@dataclass(frozen=True)
class Case:
    """One request and its pictures or videos, one per prompt; differences are in steps of 1/255.

    `fps` are 0 for pictures. `sounds` are files and rates, none of silent ones; sound differs in steps of
    1/32767.
    """

    model: str
    name: str
    request: dict[str, Any]
    files: tuple[Path, ...]
    seeds: tuple[int, ...]
    fps: tuple[int, ...]
    max_abs: float
    mean_abs: float
    sounds: tuple[tuple[Path, int], ...]
    sound_max_abs: float

    def __str__(self) -> str:
        return f"{self.model}-{self.name}"

    @property
    def loras(self) -> Path:
        """The LoRA root of the request's paths."""
        return FOLDER / self.model / "lora"

    def check(self, pictures: Iterable[np.ndarray]) -> None:
        """Assert that pictures in the order of the prompts are the expected ones, within the tolerance."""
        for picture, file in zip(pictures, self.files, strict=True):
            expected = np.load(file)
            assert (picture.dtype, picture.shape) == (expected.dtype, expected.shape)
            difference = np.abs(picture.astype(int) - expected.astype(int))
            assert difference.max() <= self.max_abs, f"{self}: largest difference {difference.max()}"
            assert difference.mean() <= self.mean_abs, f"{self}: mean difference {difference.mean()}"

    def check_sounds(self, sounds: Iterable[Sound]) -> None:
        """Assert that sounds in the order of the prompts are the expected ones, within the tolerance."""
        for sound, (file, rate) in zip(sounds, self.sounds, strict=True):
            expected = np.load(file)
            assert (sound.rate, sound.samples.shape) == (rate, expected.shape)
            assert sound.samples.dtype == np.float32
            difference = np.abs(sound.samples * 32767 - expected).max()
            assert difference <= self.sound_max_abs, f"{self}: largest difference of the sound {difference}"


def load_cases() -> list[Case]:
    """Return every case of every id; the cases of a sequence are in order and must run in one process."""
    return [case for model in MODELS for case in _load(model, "cases.json")]


def load_previews() -> list[Case]:
    """Return every case that is rendered like the trainer, for ids whose pictures then differ."""
    models = [model for model in MODELS if (FOLDER / model / "preview.json").exists()]
    return [case for model in models for case in _load(model, "preview.json")]


def load_deep_preview() -> tuple[Case, dict[str, Any]]:
    """Return the preview of LTX-2.3 with more layers, and its config changes by repository and component."""
    (entry,) = json.loads((FOLDER / "ltx2.3" / "preview_deep.json").read_text())
    return _case("ltx2.3", entry), entry["config_override"]


def _load(model: str, file: str) -> list[Case]:
    entries = json.loads((FOLDER / model / file).read_text())
    entries.sort(key=lambda entry: list(entry.get("sequence", {}).values()))
    return [_case(model, entry) for entry in entries]


def _case(model: str, entry: dict[str, Any]) -> Case:
    expect = entry["expect"] if isinstance(entry["expect"], list) else [entry["expect"]]
    stated = [one["audio_tolerance"]["max_abs"] for one in expect if "audio" in one]
    return Case(
        model=model,
        name=entry["name"],
        request=entry["request"],
        files=tuple(FOLDER / model / one["file"] for one in expect),
        seeds=tuple(one["seed"] for one in expect),
        fps=tuple(one.get("fps", 0) for one in expect),
        sounds=tuple(
            (FOLDER / model / one["audio"], one["audio_sample_rate"]) for one in expect if "audio" in one
        ),
        sound_max_abs=max([SOUND_MAX_ABS.get(model, 0), *stated]),
        **entry["tolerance"],
    )


def write_mirror(target: Path) -> None:
    """Write the tiny checkpoint of every repository as an `org--name` folder below `target`."""
    from deployments.engine.tiny import materialize
    from deployments.pipelines.hidream_o1 import PixelTransformer

    # The config is that of a plain Qwen3-VL.
    classes = {"HiDream-ai/HiDream-O1-Image": PixelTransformer}
    for file in sorted(FOLDER.glob("*/repos.json")):
        for repo, folders in json.loads(file.read_text()).items():
            for folder in [folders] if isinstance(folders, str) else folders:
                materialize(file.parent / folder, target / repo.replace("/", "--"), classes.get(repo))
