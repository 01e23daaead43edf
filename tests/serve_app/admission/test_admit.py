"""Admission resolves defaults, sizes, seeds, trigger words, multipliers and control images."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.objects.directory import DirectoryStore
from cluster.objects.store import content_key
from deployments.catalog import CATALOG, ModelSpec
from deployments.spec.job import LoraSpec, PromptSpec, RenderSpec
from deployments.spec.lora_reference import parse
from serve_app.admission.admit import admit
from serve_app.settings import Settings
from serve_app.wire.refusals import Refusal
from serve_app.wire.requests import InferenceRequest
from tests.serve_app.conftest import admitted, base64_png, body, kontext_body, png


@pytest.mark.parametrize("row", CATALOG.values(), ids=list(CATALOG))
def test_defaults_are_those_of_the_row(place: Path, row: ModelSpec) -> None:
    image = {"ctrl_img": base64_png()} if row.control_images.least else {}
    expert: dict[str, Any] = {"transformer": "high"} if row.experts else {}
    spec = admitted(place, body(model=row.id, prompt=image, lora=expert))
    expected = PromptSpec(
        prompt="a red fox",
        neg="",
        width=row.width // row.divisor * row.divisor,
        height=row.height // row.divisor * row.divisor,
        steps=row.steps,
        guidance=row.guidance,
        seed=42,
        controls=(content_key(png()),) if image else (),
        num_frames=row.video.frames if row.video else None,
        fps=row.video.fps if row.video else None,
        options=dict(row.options),
    )
    lora = LoraSpec(path=parse("style.safetensors"), multiplier=1.0, **expert)
    expected_spec = RenderSpec(model=row.id, loras=(lora,), prompts=(expected,), output_format=row.formats[0])
    assert spec == expected_spec


def test_null_means_default_everywhere(place: Path) -> None:
    names = ("width", "height", "guidance_scale", "sample_steps", "neg", "seed", "trigger_word", "ctrl_img")
    nulls = body(prompt=dict.fromkeys(names), lora={"network_multiplier": None}, output_format=None)
    assert admitted(place, nulls) == admitted(place, body())


def test_options_are_those_of_the_request_where_the_model_has_them(place: Path) -> None:
    image = {"ctrl_img": base64_png()}

    def options(model: str, **fields: bool | None) -> dict[str, bool]:
        return admitted(place, body(model=model, prompt=image, **fields)).prompts[0].options

    assert options("krea2_o_edit", kv_cache=False) == {"kv_cache": False, "match_target_res": True}
    assert options("krea2_o_edit", match_target_res=False) == {"kv_cache": True, "match_target_res": False}
    assert options("krea2_o_edit", kv_cache=None) == {"kv_cache": True, "match_target_res": True}
    assert options("flux", kv_cache=True) == {}


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ({"num_frames": 1}, "NUM_FRAMES_NOT_SUPPORTED"),
        ({"fps": 25}, "FPS_NOT_SUPPORTED"),
        ({"num_frames": 2, "fps": 24}, None),
    ],
)
def test_videos_that_minimax_h3_does_not_make(place: Path, prompt: dict[str, Any], code: str | None) -> None:
    if code is None:
        assert admitted(place, body(model="minimax_h3", prompt=prompt)).prompts[0].num_frames == 2
        return
    with pytest.raises(Refusal) as refusal:
        admitted(place, body(model="minimax_h3", prompt=prompt))
    assert refusal.value.code == code


def test_a_preview_of_minimax_h3_ignores_the_rate(place: Path) -> None:
    request = body(model="minimax_h3", prompt={"fps": 12}, sampling="preview")
    assert admitted(place, request).prompts[0].fps == 24


def test_a_preview_of_minimax_h3_may_be_one_frame(place: Path) -> None:
    request = body(model="minimax_h3", prompt={"num_frames": 1}, sampling="preview")
    assert admitted(place, request).prompts[0].num_frames == 1


def test_of_several_images_minimax_h3_takes_the_first(place: Path) -> None:
    images = {"ctrl_img_2": base64_png(), "ctrl_img_3": base64_png(), "ctrl_img": base64_png()}
    assert len(admitted(place, body(model="minimax_h3", prompt=images)).prompts[0].controls) == 1


def test_high_resolution_is_of_one_model_and_not_of_its_previews(place: Path) -> None:
    high = {"resolution": "High"}
    assert admitted(place, body(model="ltx2.3", prompt=high)).prompts[0].resolution == "High"
    for fields in ({"model": "ltx2"}, {"model": "ltx2.3", "sampling": "preview"}):
        with pytest.raises(Refusal) as refusal:
            admitted(place, body(prompt=high, **fields))
        assert refusal.value.code == "RESOLUTION_NOT_SUPPORTED"


def test_own_values_are_kept(place: Path) -> None:
    prompt = {"width": 640, "height": 512, "guidance_scale": 0, "sample_steps": 3, "neg": "blur", "seed": 0}
    spec = admitted(place, body(prompt=prompt, lora={"network_multiplier": 0}, output_format="png"))
    assert spec.prompts[0] == PromptSpec(
        prompt="a red fox", neg="blur", width=640, height=512, steps=3, guidance=0.0, seed=0
    )
    assert spec.loras[0].multiplier == 0.0
    assert spec.output_format == "png"


def test_a_video_has_frames_and_a_picture_has_none(place: Path) -> None:
    asked = {"num_frames": "8", "fps": 24}
    (video,) = admitted(place, body(model="wan21_1b", prompt=asked, output_format="mp4")).prompts
    assert (video.num_frames, video.fps) == (8, 24)
    (picture,) = admitted(place, body(prompt=asked)).prompts
    assert (picture.num_frames, picture.fps) == (None, None)


@given(row=st.sampled_from(list(CATALOG.values())), width=st.integers(64, 4096), height=st.integers(64, 4096))
def test_sizes_are_floored_to_the_divisor(place: Path, row: ModelSpec, width: int, height: int) -> None:
    image = {"ctrl_img": base64_png()} if row.control_images.least else {}
    expert = {"transformer": "low"} if row.experts else {}
    asked_for = {"width": width, "height": height, **image}
    (prompt,) = admitted(place, body(model=row.id, prompt=asked_for, lora=expert)).prompts
    for asked, got in ((width, prompt.width), (height, prompt.height)):
        assert got % row.divisor == 0
        assert 0 <= asked - got < row.divisor
        assert got > 0


def test_seeds_count_up_from_42_by_the_index_of_the_prompt(place: Path) -> None:
    prompts = [{"prompt": "a"}, {"prompt": "b", "seed": 7}, {"prompt": "c", "seed": None}]
    assert [prompt.seed for prompt in admitted(place, body(prompts=prompts)).prompts] == [42, 7, 44]


def test_random_seeds_are_drawn_now_and_leave_the_global_generator_alone(place: Path) -> None:
    state = random.getstate()
    prompts = [{"prompt": "a", "seed": -1}] * 50
    seeds = [prompt.seed for prompt in admitted(place, body(prompts=prompts)).prompts]
    assert len(set(seeds)) > 45
    assert all(0 <= seed < 2**31 - 1 for seed in seeds)
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("own", "shared", "text"),
    [
        ("p5x", "q7y", "a p5x and p5x"),
        (None, "q7y", "a q7y and q7y"),
        ("", "q7y", "a q7y and q7y"),
        ("p5x", None, "a p5x and p5x"),
        (None, None, "a [trigger] and [trigger]"),
        ("", "", "a [trigger] and [trigger]"),
        ("[trigger]", None, "a [trigger] and [trigger]"),
        (r"\g<0>", None, r"a \g<0> and \g<0>"),
    ],
)
def test_trigger_words_replace_the_literal(
    place: Path, own: str | None, shared: str | None, text: str
) -> None:
    prompt = {"prompt": "a [trigger] and [trigger]", "trigger_word": own, "neg": "[trigger]"}
    (resolved,) = admitted(place, body(prompt=prompt, trigger_word=shared)).prompts
    assert resolved.prompt == text
    assert resolved.neg == "[trigger]"


def test_other_spellings_of_the_trigger_are_no_trigger(place: Path) -> None:
    spec = admitted(place, body(prompt={"prompt": "[Trigger] [ trigger ]"}, trigger_word="p5x"))
    assert spec.prompts[0].prompt == "[Trigger] [ trigger ]"


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,"])
def test_control_images_are_stored_as_sent_under_their_hash(place: Path, prefix: str) -> None:
    data = png(33, 17)
    text = prefix + base64_png(33, 17)
    spec = admitted(place, body(model="flux_kontext", prompt={"ctrl_img": text}))
    (key,) = spec.prompts[0].controls
    assert key == content_key(data)
    assert DirectoryStore(place / "outputs").get(key) == data


def test_an_image_of_several_prompts_is_stored_once_for_each_request(place: Path) -> None:
    class CountedStore(DirectoryStore):
        puts = 0

        def put(self, key: str, data: bytes, content_type: str) -> None:
            self.puts += 1
            super().put(key, data, content_type)

    store = CountedStore(place / "counted")
    request = kontext_body()
    request["prompts"] *= 3
    for puts in (1, 2):
        spec = admit(
            InferenceRequest.model_validate(request),
            Settings.model_validate({"loras": place}),
            store,
        )
        assert [prompt.controls for prompt in spec.prompts] == [(content_key(png()),)] * 3
        assert store.puts == puts, "the next request must store it again, which resets its age"


@pytest.mark.parametrize("slot", ["ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3"])
def test_a_numbered_control_image_wins_over_the_plain_one(place: Path, slot: str) -> None:
    request = body(model="flux_kontext", prompt={"ctrl_img": base64_png(8, 8), slot: base64_png(9, 9)})
    assert admitted(place, request).prompts[0].controls == (content_key(png(9, 9)),)


def test_animations_and_alpha_are_pictures_too(place: Path) -> None:
    frames = [Image.new("P", (8, 8), index) for index in range(3)]
    gif, rgba = io.BytesIO(), io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    Image.new("LA", (8, 8)).save(rgba, "PNG")
    for picture in (gif, rgba):
        text = base64.b64encode(picture.getvalue()).decode()
        spec = admitted(place, body(model="flux_kontext", prompt={"ctrl_img": text}))
        assert spec.prompts[0].controls == (content_key(picture.getvalue()),)


@pytest.mark.parametrize(
    ("path", "stored"),
    [
        ("HTTPS://Files.Example.com:443/A.safetensors#x", "https://files.example.com/A.safetensors"),
        ("https://civitai.com/api/download/models/128713", "https://civitai.com/api/download/models/128713"),
        (
            "https://huggingface.co/org/repo/blob/main/a/b%20c.safetensors?download=true",
            "hf://org/repo/a/b c.safetensors@main",
        ),
        (
            "http://hf.co/org/repo/resolve/refs%2Fpr%2F1/a.safetensors",
            "hf://org/repo/a.safetensors@refs/pr/1",
        ),
        ("hf://org/repo/a.safetensors", "hf://org/repo/a.safetensors@main"),
        ("hf://org/repo/a.safetensors@v1", "hf://org/repo/a.safetensors@v1"),
        (
            "https://huggingface.co/datasets/org/repo/blob/main/a.safetensors",
            "https://huggingface.co/datasets/org/repo/resolve/main/a.safetensors",
        ),
        ("s3://styles/a/b.safetensors", "s3://styles/a/b.safetensors"),
        ("http://10.0.0.5:9000/a.safetensors", "http://10.0.0.5:9000/a.safetensors"),
    ],
)
def test_references_to_elsewhere_are_kept_in_one_form(place: Path, path: str, stored: str) -> None:
    listed = {"fetch_buckets": ["styles"], "fetch_hosts": ["10.0.0.5:9000"]}
    settings = Settings.model_validate({"loras": place, **listed})
    request = body(lora={"path": path, "sha256": "AB" * 32})
    spec = admit(InferenceRequest.model_validate(request), settings, DirectoryStore(place / "outputs"))
    assert spec.loras == (LoraSpec(path=parse(stored), sha256="ab" * 32),)


def test_the_url_of_a_control_image_is_kept(place: Path) -> None:
    spec = admitted(place, body(model="flux_kontext", prompt={"ctrl_img": "https://Files.example.com/a.png"}))
    assert spec.prompts[0].controls == ("https://files.example.com/a.png",)
    # A model without control images ignores the URL.
    spec = admitted(place, body(prompt={"ctrl_img": "http://127.0.0.1/a.png?secret"}))
    assert spec.prompts[0].controls == ()


def test_a_lora_that_changes_is_judged_anew(place: Path) -> None:
    file = place / "style.safetensors"
    admitted(place, body())
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(Refusal):
        admitted(place, body())
    file.write_bytes(good)
    admitted(place, body())
