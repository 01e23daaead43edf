"""The spec of a job, and which of its parts are secret."""

from __future__ import annotations

from deployments.spec.job import LoraSpec, PromptSpec, RenderSpec, join_secrets, split_secrets
from deployments.spec.lora_reference import parse


def spec(*loras: str, controls: tuple[str, ...] = ()) -> RenderSpec:
    prompt = PromptSpec(
        prompt="a?b", neg="", width=64, height=64, steps=1, guidance=1.0, seed=1, controls=controls
    )
    return RenderSpec(
        model="flux", loras=tuple(LoraSpec(path=parse(path)) for path in loras), prompts=(prompt, prompt)
    )


def test_queries_of_urls_travel_apart() -> None:
    whole = spec(
        "https://a.example/x?sig=1",
        "what?.safetensors",
        controls=("inputs/1", "HTTP://b.example/y?", "https://c/z?s=2?t"),
    )
    without, queries = split_secrets(whole)
    assert [lora.path.text for lora in without.loras] == ["https://a.example/x", "what?.safetensors"]
    assert without.prompts[1].controls == ("inputs/1", "HTTP://b.example/y", "https://c/z")
    assert "sig" not in without.model_dump_json() and "s=2" not in without.model_dump_json()
    assert join_secrets(without, queries) == whole
    assert without.adapter == whole.adapter


def test_without_queries_there_is_no_secret() -> None:
    whole = spec("a.safetensors", "https://a.example/x", controls=("inputs/1",))
    assert split_secrets(whole) == (whole, [])
    assert join_secrets(whole, []) == whole
