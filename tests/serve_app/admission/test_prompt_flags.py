"""Flags in prompts, as the trainer parses its sample prompts, and requests that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.objects.store import content_key
from serve_app.admission.prompt_flags import FlagError, Flags, read_prompt
from serve_app.wire.requests import PromptItem
from tests.serve_app.conftest import Service, admitted, base64_png, body, png


@pytest.mark.parametrize(
    ("text", "prompt", "said"),
    [
        ("a cat", "a cat", {}),
        ("  a cat \n", "a cat", {}),
        ("", "", {}),
        ("a cat -- wide angle, red hat", "a cat", {}),
        ("a well--known cat", "a well", {}),
        ("a cat --n", "a cat", {"neg": ""}),
        ("a cat --n  blurry,  low - quality ", "a cat", {"neg": "blurry,  low - quality"}),
        ("a cat --w 512--h 64", "a cat", {"width": 512, "height": 64}),
        ("--w 72 --h -3", "", {"width": 72, "height": 64}),
        ("a cat --w 17", "a cat", {"width": 64}),
        ("a --d 7", "a", {"seed": 7}),
        ("a --d 7 --seed 8", "a", {"seed": 8}),
        ("a --seed 8 --d 7", "a", {"seed": 7}),
        ("a --l 2.5 --s 3", "a", {"guidance_scale": 2.5, "sample_steps": 3}),
        ("a --cfg 0 --steps 150", "a", {"guidance_scale": 0.0, "sample_steps": 150}),
        ("a --m -0.5", "a", {"network_multiplier": -0.5}),
        ("a --network_multiplier 2", "a", {"network_multiplier": 2.0}),
        ("a --gr 0.7", "a", {"guidance_rescale": 0.7}),
        ("a --p2 a boat --n2 snow --fast --W 99 --num_frames 9 --ctrl_img /etc/passwd", "a", {}),
    ],
)
def test_what_a_prompt_says(text: str, prompt: str, said: dict[str, Any]) -> None:
    assert read_prompt(text) == (prompt, Flags.model_validate(said))


@given(st.text().filter(lambda text: "--" not in text))
def test_without_two_dashes_only_blanks_go(text: str) -> None:
    assert read_prompt(text) == (text.strip(), Flags())


def test_what_the_flags_override_are_fields_of_a_prompt() -> None:
    assert set(Flags.model_fields) - set(PromptItem.model_fields) == {
        "network_multiplier",
        "guidance_rescale",
    }


@pytest.mark.parametrize(
    "text",
    [
        *("--w wide", "--w", "--w 512, a dog", "--h 4097", "--seed 1.5", "--seed -2", f"--d {2**64}"),
        *("--s 0", "--s 151", "--l nan", "--l 21", "--m 3", "--m inf", "--gr inf"),
    ],
)
def test_values_outside_of_the_field_are_faults(text: str) -> None:
    with pytest.raises(FlagError):
        read_prompt(f"a cat {text}")


def test_flags_are_the_same_as_fields_and_win_over_them(place: Path) -> None:
    flags = "a cat --n blurry --w 203 --h 72 --d 5 --l 2.5 --s 3"
    others = {"width": 512, "height": 512, "seed": 9, "guidance_scale": 7, "sample_steps": 9, "neg": "dog"}
    fields = {
        "neg": "blurry",
        "width": 203,
        "height": 72,
        "seed": 5,
        "guidance_scale": 2.5,
        "sample_steps": 3,
    }
    for prompt in ({"prompt": flags}, {"prompt": flags, **others}):
        (flagged,) = admitted(place, body(sampling="preview", prompt=prompt)).prompts
        (sent,) = admitted(place, body(sampling="preview", prompt={"prompt": "a cat", **fields})).prompts
        assert flagged.model_copy(update={"neg_2": None}) == sent
        assert (flagged.neg_2, sent.neg_2) == (prompt.get("neg", ""), None)


def test_a_weight_is_of_its_prompt_alone(place: Path) -> None:
    prompts = [{"prompt": "a --m 0.5"}, {"prompt": "a"}]
    spec = admitted(place, body(sampling="preview", prompts=prompts, lora={"network_multiplier": 0.8}))
    assert [prompt.multiplier for prompt in spec.prompts] == [0.5, None]
    assert [lora.multiplier for lora in spec.loras] == [0.8]


def test_a_trigger_word_is_put_in_first(place: Path) -> None:
    prompt = {"prompt": " [name], a [trigger]", "trigger_word": "p5x --s 3"}
    (resolved,) = admitted(place, body(sampling="preview", prompt=prompt)).prompts
    assert (resolved.prompt, resolved.steps) == ("p5x", 3)
    (resolved,) = admitted(place, body(sampling="preview", prompt={**prompt, "trigger_word": "p5x"})).prompts
    assert (resolved.prompt, resolved.steps) == ("p5x, a p5x", 25)
    (resolved,) = admitted(place, body(sampling="preview", prompt={"prompt": "[name]"})).prompts
    assert resolved.prompt == "[name]"


@pytest.mark.parametrize("sampling", [{}, {"sampling": None}, {"sampling": "reference"}])
def test_the_reference_takes_every_character_as_it_is(place: Path, sampling: dict[str, None]) -> None:
    prompt = {"prompt": " [name] --w 64 --n x ", "trigger_word": "p5x"}
    (resolved,) = admitted(place, body(prompt=prompt, **sampling)).prompts
    assert (resolved.prompt, resolved.width, resolved.neg) == (" [name] --w 64 --n x ", 1024, "")
    assert resolved.sampling == "reference"


@pytest.mark.parametrize(
    ("model", "sent", "taken", "shown_only"),
    [
        ("flux_kontext", "c1", "c", False),
        ("flux_kontext", "12", "1", False),
        ("qwen_image_edit", "c12", "c", False),
        ("qwen_image_edit", "23", "2", False),
        ("flux2", "c", "c", False),
        ("flux2", "c12", "c2", False),
        ("flux2", "123", "123", False),
        ("flux2_klein_4b", "c3", "c3", False),
        ("flux2_diffusers", "c23", "c23", False),
        ("qwen_image_edit_plus", "1", "1", False),
        ("qwen_image_edit_plus", "123", "123", False),
        ("qwen_image_edit_plus", "c", "cc", True),
        ("qwen_image_edit_plus", "c23", "cc23", True),
        ("qwen_image_edit_plus", "c123", "c123", True),
        ("qwen_image_edit_plus_2511", "c1", "c1", True),
        ("flex2", "c1", "", False),
    ],
)
def test_the_control_images_of_previews(
    place: Path, model: str, sent: str, taken: str, shown_only: bool
) -> None:
    sides = {"c": 100, "1": 101, "2": 102, "3": 103}
    fields = {"c": "ctrl_img", "1": "ctrl_img_1", "2": "ctrl_img_2", "3": "ctrl_img_3"}
    images = {fields[name]: base64_png(sides[name], 100) for name in sent}
    (prompt,) = admitted(place, body(model=model, sampling="preview", prompt=images)).prompts
    assert prompt.controls == tuple(content_key(png(sides[name], 100)) for name in taken)
    assert prompt.second_is_shown_only is shown_only


@pytest.mark.parametrize(
    ("model", "asked", "got"),
    [
        ("flex2", 120, 112),
        ("chroma", 120, 112),
        ("zimage", 120, 112),
        ("lumina2", 120, 112),
        ("flux2_diffusers", 120, 112),
        ("qwen_image", 112, 96),
        ("hidream", 103, 96),
        ("sd15", 103, 96),
    ],
)
def test_sizes_of_previews_have_their_own_divisor(place: Path, model: str, asked: int, got: int) -> None:
    request = body(model=model, sampling="preview", prompt={"width": asked, "height": 256})
    (prompt,) = admitted(place, request).prompts
    assert (prompt.width, prompt.height) == (got, 256)


def test_flux2_renders_the_previews_of_flux2_diffusers(place: Path) -> None:
    assert admitted(place, body(model="flux2_diffusers", sampling="preview")).model == "flux2"
    assert admitted(place, body(model="flux2_diffusers")).model == "flux2_diffusers"


def test_over_http(service: Service) -> None:
    assert service.post(body(sampling="preview", prompt={"prompt": "a --w 512"})).status_code == 200
    before = service.stored
    assert service.post(body(sampling="trainer")).status_code == 422
    answer = service.post(body(sampling="preview", prompt={"prompt": "a --w wide"}))
    error = answer.json()["detail"]["error"]
    assert (answer.status_code, error["code"]) == (400, "PROMPT_FLAG_INVALID")
    assert error["details"]["prompt_index"] == 0
    assert error["details"]["reason"].startswith("width: Input should be a valid integer")
    answer = service.post(body(model="qwen_image_edit_plus", sampling="preview"))
    assert answer.json()["detail"]["error"]["code"] == "CONTROL_IMAGE_REQUIRED"
    assert service.stored == before
