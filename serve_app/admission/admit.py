"""Turns a request into what workers render: checks model rules and service limits, fills in defaults.

Blocking, without HTTP: the gateway runs it in a thread, `lora-serve render` calls it directly.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from cluster.net.urls import UrlRefused, check_url, parse_hosts, parse_url
from cluster.objects.store import ObjectStore, content_key
from cluster.secrets import can_seal
from deployments.catalog import CATALOG, ModelSpec
from deployments.catalog.control_choices import Choice
from deployments.engine.media import ImageRejected, ImageTooLarge, decode_base64, decode_control
from deployments.spec.job import LoraSpec, PromptSpec, RenderSpec, bare
from deployments.spec.lora_reference import LoraReference
from serve_app.admission.lora_rules import URL, check_loras
from serve_app.admission.prompt_flags import FlagError, Flags, read_prompt
from serve_app.admission.video_rules import check_video, frames_per_second
from serve_app.settings import Settings
from serve_app.wire.refusals import Code, Refusal
from serve_app.wire.requests import InferenceRequest, LoraItem, PromptItem

FIRST_SEED = 42
"""A prompt without a seed gets this seed plus its index, as in the reference server."""

RANDOM_SEEDS = 2**31 - 1
"""Seed -1 becomes a random seed below this, as in the reference server."""

_NAMED_FIELDS = 20


def admit(
    request: InferenceRequest, settings: Settings, store: ObjectStore, *, kept: bool = True
) -> RenderSpec:
    """Check a request as `check` does, then put its control images into `store`.

    Nothing is stored unless every check passes. Raises `Refusal`.
    """
    spec, images = check(request, settings, kept=kept)
    keep_images(images, store)
    return spec


def check(
    request: InferenceRequest, settings: Settings, *, kept: bool = True
) -> tuple[RenderSpec, Mapping[str, bytes]]:
    """Return the spec that a request becomes, and the control images to store for it, by key.

    Checks run in the reference server's order, then come our own limits; the first failed check raises
    `Refusal`. A request that will be stored (`kept`) may contain secrets only if they can be encrypted.
    """
    row = CATALOG.get(request.model)
    if row is None:
        raise Refusal(Code.MODEL_NOT_FOUND, supported_models=list(CATALOG))
    model = row.sampled(request.sampling or "reference")
    references = check_loras(request, model, settings)
    choices = [model.control_images.choose(prompt.control_images) for prompt in request.prompts]
    _check_control_images_are_there(choices, model)
    _check_bounds(request, choices, model, settings)
    prompts = [_resolve_prompt(request, index, model) for index in range(len(request.prompts))]
    if kept:
        _check_secrets(request, choices, model, references)
    controls = [_decode_controls(choice, index, model, settings) for index, choice in enumerate(choices)]
    spec = RenderSpec(
        model=model.id,
        loras=tuple(map(_resolve_lora, request.loras, references)),
        prompts=tuple(map(_with_controls, prompts, choices, controls)),
        output_format=request.output_format or model.formats[0],
        warnings=tuple(_warnings(request, choices, model)),
    )
    # Keys are content hashes, so an image that several prompts share appears once.
    return spec, {key: data for images in controls for key, data in images if data is not None}


def keep_images(images: Mapping[str, bytes], store: ObjectStore) -> None:
    """Put control images into `store`.

    An image that is already there is stored again. This resets its age, so that a lifecycle rule of the store
    does not delete it before this job has run.
    """
    for key, data in images.items():
        store.put(key, data, "application/octet-stream")


def _check_control_images_are_there(choices: Sequence[Choice], model: ModelSpec) -> None:
    for index, choice in enumerate(choices):
        if len(choice.images) < model.control_images.least:
            raise Refusal(Code.CONTROL_IMAGE_REQUIRED, model=model.id, prompt_index=index)


def _check_bounds(
    request: InferenceRequest, choices: Sequence[Choice], model: ModelSpec, settings: Settings
) -> None:
    if len(request.prompts) > settings.max_prompts:
        raise Refusal(Code.TOO_MANY_PROMPTS, prompts=len(request.prompts), most=settings.max_prompts)
    if request.output_format is not None:
        check_format(request.output_format, model)
    longest = settings.max_prompt_chars
    for index, (prompt, choice) in enumerate(zip(request.prompts, choices, strict=True)):
        texts = (prompt.prompt, prompt.neg, prompt.trigger_word, request.trigger_word)
        # The parts first: filling in a long trigger word many times would make a huge text.
        if any(len(text or "") > longest for text in texts) or len(_text(request, prompt)) > longest:
            raise Refusal(Code.PROMPT_TOO_LONG, prompt_index=index, most=longest)
        check_video(prompt, index, model)
        if prompt.resolution == "High" and model.high is None:
            raise Refusal(Code.RESOLUTION_NOT_SUPPORTED, model=model.id, prompt_index=index)
        if 0 < model.control_images.most < len(choice.images):
            raise Refusal(
                Code.TOO_MANY_CONTROL_IMAGES,
                model=model.id,
                prompt_index=index,
                most=model.control_images.most,
            )


def check_format(format: str, model: ModelSpec) -> None:
    """Raise `Refusal` unless the model supports the output format."""
    if format not in model.formats:
        raise Refusal(Code.OUTPUT_FORMAT_NOT_SUPPORTED, model=model.id, supported=model.formats)


def _check_secrets(
    request: InferenceRequest,
    choices: Sequence[Choice],
    model: ModelSpec,
    references: Sequence[LoraReference],
) -> None:
    """Refuse a token or the query of a URL if the service cannot encrypt it."""
    images = [image for choice in choices for image in choice.images] if model.control_images.most else []
    queries = any(reference.query for reference in references) or any(bare(url) != url for url in images)
    if (request.hf_token or queries) and not can_seal():
        raise Refusal(Code.SECRET_KEY_REQUIRED)


def _decode_controls(
    choice: Choice, index: int, model: ModelSpec, settings: Settings
) -> list[tuple[str, bytes | None]]:
    """Return the images that the model takes: (URL, None), or (key, bytes as sent) if they decode."""
    if not model.control_images.most:
        return []
    decoded: list[tuple[str, bytes | None]] = []
    for image in choice.images:
        if image.startswith("http") or URL.match(image):
            decoded.append((_check_control_url(image, index, settings), None))
            continue
        try:
            data = decode_base64(image)
            size = decode_control(data, settings.max_image_pixels).size
        except ImageTooLarge as error:
            most = settings.max_image_pixels
            raise Refusal(Code.CONTROL_IMAGE_TOO_LARGE, prompt_index=index, max_pixels=most) from error
        except ImageRejected as error:
            raise Refusal(Code.CONTROL_IMAGE_INVALID, prompt_index=index, reason=str(error)) from error
        if not model.control_images.take(size):
            least, aspect = model.control_images.least_side, model.control_images.most_aspect
            raise Refusal(Code.CONTROL_IMAGE_SHAPE, prompt_index=index, least_side=least, most_aspect=aspect)
        decoded.append((content_key(data), data))
    return decoded


def _check_control_url(text: str, index: int, settings: Settings) -> str:
    try:
        url = parse_url(text)
        check_url(url, parse_hosts(settings.fetch_hosts))
    except UrlRefused as error:
        raise Refusal(Code.URL_NOT_ALLOWED, prompt_index=index, reason=str(error)) from error
    return url.full


def _resolve_lora(lora: LoraItem, reference: LoraReference) -> LoraSpec:
    multiplier = 1.0 if lora.network_multiplier is None else lora.network_multiplier
    return LoraSpec(path=reference, multiplier=multiplier, transformer=lora.transformer, sha256=lora.sha256)


def _resolve_prompt(request: InferenceRequest, index: int, model: ModelSpec) -> PromptSpec:
    """Return prompt `index` with every default filled in, without its control images."""
    prompt, flags = _read_prompt(request, index)
    return PromptSpec(
        prompt=prompt.prompt,
        neg=prompt.neg or "",
        width=(prompt.width or model.width) // model.divisor * model.divisor,
        height=(prompt.height or model.height) // model.divisor * model.divisor,
        steps=prompt.sample_steps or model.steps,
        guidance=model.guidance if prompt.guidance_scale is None else prompt.guidance_scale,
        seed=_seed(prompt.seed, index),
        num_frames=(prompt.num_frames or model.video.frames) if model.video else None,
        fps=frames_per_second(prompt, model.video) if model.video else None,
        options={name: _option(request, name, default) for name, default in model.options.items()},
        resolution=prompt.resolution or "Default",
        sampling=request.sampling or "reference",
        multiplier=flags.network_multiplier,
        guidance_rescale=flags.guidance_rescale,
        neg_2=None if flags.neg is None else request.prompts[index].neg or "",
    )


def _read_prompt(request: InferenceRequest, index: int) -> tuple[PromptItem, Flags]:
    """Fill in the trigger word. In a preview, let the prompt's flags override its fields."""
    prompt = request.prompts[index]
    text = _text(request, prompt)
    if request.sampling != "preview":
        return prompt.model_copy(update={"prompt": text}), Flags()
    try:
        text, flags = read_prompt(text)
    except FlagError as error:
        raise Refusal(Code.PROMPT_FLAG_INVALID, prompt_index=index, reason=str(error)) from error
    return prompt.model_copy(update={**flags.overrides, "prompt": text}), flags


def _option(request: InferenceRequest, name: str, default: bool) -> bool:
    sent: bool | None = getattr(request, name)
    return default if sent is None else sent


def _text(request: InferenceRequest, prompt: PromptItem) -> str:
    trigger = prompt.trigger_word or request.trigger_word
    if not trigger:
        return prompt.prompt
    text = prompt.prompt.replace("[name]", trigger) if request.sampling == "preview" else prompt.prompt
    return text.replace("[trigger]", trigger)


def _with_controls(
    prompt: PromptSpec, choice: Choice, images: Sequence[tuple[str, bytes | None]]
) -> PromptSpec:
    controls = tuple(key for key, _ in images)
    shown_only = bool(controls) and choice.second_is_shown_only
    return prompt.model_copy(update={"controls": controls, "second_is_shown_only": shown_only})


def _seed(seed: int | None, index: int) -> int:
    """Choose the seed now, so that every attempt of the job renders the same picture."""
    if seed is None:
        return FIRST_SEED + index
    return secrets.randbelow(RANDOM_SEEDS) if seed == -1 else seed


def _warnings(request: InferenceRequest, choices: Sequence[Choice], model: ModelSpec) -> list[str]:
    warnings = []
    if unknown := request.unknown_fields:
        # Quoted and truncated: the client chose these names, and they may have any length.
        names = [repr(name[:60]) for name in unknown[:_NAMED_FIELDS]]
        more = f" and {len(unknown) - _NAMED_FIELDS} more" if len(unknown) > _NAMED_FIELDS else ""
        warnings.append(f"Unknown fields were ignored: {', '.join(names)}{more}.")
    most = model.control_images.most
    taken = [bool(most and choice.images) for choice in choices]
    if any(any(prompt.control_images) > took for prompt, took in zip(request.prompts, taken, strict=True)):
        takes = f"at most {most} per prompt" if most else "none"
        warnings.append(f"Control images were ignored: {model.id} takes {takes}.")
    return warnings
