"""Rules of the models that the golden cases do not cover, for each id that they apply to."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.jobs.model import Phase
from deployments.catalog import CATALOG
from tests.parity.cases import FOLDER, MODELS, each
from tests.support.studio import Studio, Unwatched, largest_difference

pytestmark = pytest.mark.usefixtures("small_canvas")

Get = Callable[[str], Studio]

TWO_FILES = [model for model in MODELS if len(list((FOLDER / model / "lora").iterdir())) > 1]


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.array_equal(one, other))


@pytest.mark.parametrize("model", each(MODELS))
def test_equal_requests_give_equal_pictures(studio: Get, model: str) -> None:
    used = studio(model)
    loras = {used.names[0]: 1.0}
    assert equal(used.render(loras), used.render(loras))
    assert not equal(used.render(loras), used.render(loras, seed=6))


@pytest.mark.parametrize("model", each(TWO_FILES))
def test_a_then_b_then_a_gives_the_first_picture(studio: Get, new_studio: Get, model: str) -> None:
    used = studio(model)
    a, b = ({name: 1.0} for name in used.names)
    first, second, third = used.render(a), used.render(b), used.render(a)
    assert equal(first, third)
    assert not equal(first, second)
    assert equal(second, new_studio(model).render(b))


@pytest.mark.parametrize("model", each(MODELS))
def test_a_multiplier_holds_for_one_job(studio: Get, model: str) -> None:
    used = studio(model)
    name = used.names[-1]
    pictures = {value: used.render({name: value}) for value in (0.6, 1.0, -0.6, 0.0)}
    assert equal(used.render({name: 0.6}), pictures[0.6])
    assert equal(used.render({}), pictures[0.0])
    assert len({picture.tobytes() for picture in pictures.values()}) == 4


@pytest.mark.parametrize("model", each(TWO_FILES))
def test_adapters_add_up_in_any_order(studio: Get, model: str) -> None:
    used = studio(model)
    a, b = used.names
    together = used.render({a: 0.5, b: 0.8})
    other_order = used.render({b: 0.8, a: 0.5})
    assert largest_difference(together, other_order) <= 1
    assert not equal(together, used.render({a: 0.5}))
    assert not equal(together, used.render({b: 0.8}))


@pytest.mark.parametrize("model", ["flux", "flux_kontext", "flex1", "flex2", "flux2", "flux2_diffusers"])
def test_flux_has_no_negative_prompt_and_embeds_guidance(studio: Get, model: str) -> None:
    used = studio(model)
    lora = {used.names[0]: 1.0}
    assert equal(used.render(lora, neg="blurry"), used.render(lora, neg=""))
    pictures = {used.render(lora, guidance=value).tobytes() for value in (0.0, 1.0, 4.0)}
    assert len(pictures) == 3


@pytest.mark.parametrize(
    "model",
    each(
        [
            "sd15",
            "sdxl",
            "qwen_image",
            "qwen_image_2512",
            "qwen_image_edit",
            "lumina2",
            "krea2",
            "krea2_turbo",
            "hidream_e1",
            "hidream_o1",
            "omnigen2",
        ]
    ),
)
def test_guidance_above_one_guides(studio: Get, model: str) -> None:
    used = studio(model)
    for guidance, ignored in ((0.0, True), (1.0, True), (3.0, False)):
        one, other = (used.render({}, neg=neg, guidance=guidance) for neg in ("blurry", ""))
        assert equal(one, other) is ignored


@pytest.mark.parametrize("model", ["zimage", "zimage_turbo", "zimage_deturbo"])
def test_z_image_guides_above_zero(studio: Get, model: str) -> None:
    used = studio(model)
    for guidance, ignored in ((0.0, True), (1.0, False)):
        one, other = (used.render({}, neg=neg, guidance=guidance) for neg in ("blurry", ""))
        assert equal(one, other) is ignored


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("sd15", 77),
        ("sdxl", 77),
        ("flux", 512),
        ("chroma", 512),
        ("flux2_klein_4b", 512),
        ("zimage", 512),
        ("qwen_image", 512),
        ("lumina2", 256),
        ("omnigen2", 256),
        ("krea2", 512),
    ],
)
def test_what_is_past_the_prompt_limit_has_no_effect(studio: Get, model: str, tokens: int) -> None:
    used = studio(model)
    long = "a " * tokens
    longer = used.render({}, prompt=long + "dog in the snow")
    # Not bit-exact: some encoders read the longer text, which changes the order of sums.
    assert largest_difference(used.render({}, prompt=long + "cat"), longer) <= 1
    assert (
        largest_difference(used.render({}, prompt="a cat"), used.render({}, prompt="a dog in the snow")) > 1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "drawn"), [((64, 64), (256, 256)), ((1024, 1024), (256, 256)), ((128, 64), (360, 180))]
)
def test_hidream_draws_one_area_in_any_aspect(
    studio: Get, size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    """The area is a megapixel, or a sixteenth of that on the tiny checkpoint."""
    width, height = size
    picture = studio("hidream").render({}, width=width, height=height, steps=1)
    assert picture.shape == (drawn[1], drawn[0], 3)


def test_hidream_e1_pads_to_the_checkpoint_s_own_number_where_that_is_enough(studio: Get) -> None:
    """Padding changes the picture, so the larger number must be reset after a larger picture."""
    used = studio("hidream_e1")
    transformer = used.engine._pipeline.transformer
    small = used.render({})
    assert transformer.max_seq == 1024
    large = used.render({}, width=384, height=384, steps=1)
    assert (large.shape, transformer.max_seq) == ((384, 384, 3), 24 * 48)
    assert equal(used.render({}), small)
    assert transformer.max_seq == 1024


def test_krea_2_reads_512_tokens_of_a_prompt(studio: Get) -> None:
    """diffusers would read five tokens fewer."""
    used = studio("krea2")
    long = "a " * 510
    assert not equal(used.render({}, prompt=long + "cat"), used.render({}, prompt=long + "dog"))


def test_an_empty_negative_prompt_of_sdxl_is_encoded(studio: Get) -> None:
    """diffusers zeroes the embedding if the negative prompt is missing, not if it is empty."""
    used = studio("sdxl")
    ours = used.render({})
    arguments = used.engine._arguments(used.prompt(), [])
    del arguments["negative_prompt"]
    zeroed = used.engine._pipeline(**arguments, output_type="np").images[0]
    assert not equal(ours, (zeroed * 255).round().astype(np.uint8))


@pytest.mark.parametrize("model", ["flux_kontext", "hidream_e1"])
def test_the_image_to_edit_is_stretched_to_the_output(studio: Get, model: str) -> None:
    used = studio(model)
    image = Image.radial_gradient("L").convert("RGB").resize((300, 40))
    stretched = image.resize((96, 64), Image.Resampling.BILINEAR)
    picture = used.render({}, controls=[image])
    assert picture.shape == (64, 96, 3)
    assert equal(picture, used.render({}, controls=[stretched]))
    assert not equal(picture, used.render({}, controls=[Image.new("RGB", (300, 40))]))


def test_chroma_guides_away_from_the_empty_text(studio: Get) -> None:
    used = studio("chroma")
    assert equal(used.render({}, neg="blurry"), used.render({}, neg=""))
    pictures = {value: used.render({}, guidance=value) for value in (0.0, 1.0, 3.0)}
    assert equal(pictures[0.0], pictures[1.0])
    assert not equal(pictures[1.0], pictures[3.0])


@pytest.mark.parametrize(("prompt", "seen"), [("", 2), ("a " * 600, 512)])
def test_chroma_attends_to_the_text_and_one_token_of_padding(studio: Get, prompt: str, seen: int) -> None:
    used = studio("chroma")
    mask = used.engine._arguments(used.prompt(prompt=prompt), [])["prompt_attention_mask"]
    assert (mask.dtype, mask.shape, int(mask.sum())) == (torch.bool, (1, 512), seen)
    assert mask[0, :seen].all()


def test_chroma_norms_have_the_epsilon_of_its_original_code(studio: Get) -> None:
    layer = studio("chroma").engine._pipeline.transformer.distilled_guidance_layer
    assert {norm.eps for norm in layer.norms} == {1e-6}


@pytest.mark.parametrize("model", ["flux2_klein_4b", "flux2_klein_9b"])
def test_klein_guides_above_one(studio: Get, model: str) -> None:
    used = studio(model)
    for guidance, ignored in ((0.0, True), (1.0, True), (3.0, False)):
        one, other = (used.render({}, neg=neg, guidance=guidance) for neg in ("blurry", ""))
        assert equal(one, other) is ignored


@pytest.mark.parametrize("model", ["flux2_klein_4b", "flux2"])
def test_flux2_is_sampled_with_the_trainer_s_schedule(studio: Get, model: str) -> None:
    """diffusers' own schedule also depends on the number of steps: a shift of 2.17 here, not 1.15."""
    used = studio(model)
    sigmas = used.engine._arguments(used.prompt(width=1024, height=1024, steps=25), [])["sigmas"]
    assert sigmas[:4] == pytest.approx([1.0, 0.986979, 0.973204, 0.958609], abs=1e-6)
    assert sigmas[-3:] == pytest.approx([0.301023, 0.215456, 0.116289], abs=1e-6)
    used.render({}, steps=3)
    expected = used.engine._arguments(used.prompt(steps=3), [])["sigmas"]
    assert used.engine._pipeline.scheduler.sigmas.tolist() == pytest.approx([*expected, 0.0])


@pytest.mark.parametrize("model", ["flux2_klein_4b", "flux2"])
def test_flux2_takes_its_references_in_order_and_leaves_the_size_alone(studio: Get, model: str) -> None:
    used = studio(model)
    tall, wide = Image.radial_gradient("L").resize((70, 200)), Image.linear_gradient("L").resize((300, 64))
    one, two = tall.convert("RGB"), wide.convert("RGB")
    pictures = [used.render({}, controls=controls) for controls in ([], [one], [one, two], [two, one])]
    assert {picture.shape for picture in pictures} == {(64, 96, 3)}
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_qwen_edit_stretches_its_image_for_the_latents_alone(studio: Get) -> None:
    used = studio("qwen_image_edit")
    image = Image.radial_gradient("L").convert("RGB").resize((150, 100))
    stretched = image.resize((96, 64), Image.Resampling.LANCZOS)
    # Both have the same aspect, so the text encoder gets the same size and nearly the same pixels.
    assert largest_difference(used.render({}, controls=[image]), used.render({}, controls=[stretched])) <= 1


def test_the_order_of_control_images_matters(studio: Get) -> None:
    used = studio("qwen_image_edit_plus")
    one, other = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    both, swapped = used.render({}, controls=[one, other]), used.render({}, controls=[other, one])
    assert not equal(both, swapped)
    assert not equal(both, used.render({}, controls=[one]))


def test_a_placeholder_in_a_prompt_asks_for_no_image(studio: Get) -> None:
    used = studio("qwen_image_edit")
    assert equal(used.render({}, prompt="a <|image_<|image_pad|>pad|>cat"), used.render({}, prompt="a cat"))


@pytest.mark.parametrize("model", each(MODELS))
def test_the_repository_s_scheduler_is_used_unless_the_row_says_otherwise(studio: Get, model: str) -> None:
    config = studio(model).engine._pipeline.scheduler.config
    row = CATALOG[model].scheduler
    for name, value in (row[1] if row else {}).items():
        assert config[name] == value


class Interrupted(Exception):
    """Raised by the observer below."""


class Interrupting(Unwatched):
    """Ends a prompt after its second step."""

    def on_step(self, done: int, total: int) -> None:
        if done == 2:
            raise Interrupted


class Recording(Unwatched):
    """Records phases and steps in order."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_phase(self, phase: Phase) -> None:
        if phase not in self.seen[-1:]:  # A phase is reported again while it goes on.
            self.seen.append(phase)

    def on_step(self, done: int, total: int) -> None:
        self.seen.append((done, total))


@pytest.mark.parametrize("model", each(MODELS))
def test_after_an_interruption_the_next_picture_is_right(studio: Get, model: str) -> None:
    used = studio(model)
    lora = {used.names[0]: 1.0}
    before = used.render(lora, steps=4)
    with pytest.raises(Interrupted):
        used.engine.render(used.prompt(steps=4, seed=9), used.controls, Interrupting())
    assert equal(used.render(lora, steps=4), before)


@pytest.mark.parametrize("model", each(MODELS))
def test_an_observer_hears_of_every_step_and_phase(studio: Get, model: str) -> None:
    used, observer = studio(model), Recording()
    used.engine.render(used.prompt(steps=3), used.controls, observer)
    steps = [(1, 3), (2, 3), (3, 3)]
    assert observer.seen == [Phase.ENCODE, Phase.STEP, *steps, Phase.DECODE]


@pytest.mark.parametrize("model", each(MODELS))
def test_global_state_is_left_alone(new_studio: Get, model: str) -> None:
    def state() -> list[object]:
        kind, keys, *rest = np.random.get_state()
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            kind,
            list(keys),
            rest,
            torch.get_num_threads(),
        ]

    before = state()
    used = new_studio(model)
    used.render({used.names[0]: 1.0})
    assert state() == before
