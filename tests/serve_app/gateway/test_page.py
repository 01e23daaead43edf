"""The page in Chromium, on a real service whose worker renders a tiny checkpoint."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from safetensors.numpy import save_file

from deployments.engine.tiny import write_tiny_checkpoints, write_tiny_lora
from tests.serve_app.conftest import png, save_pair, serving
from tests.support.browser import browsing
from tests.support.service import edited_config, free_port, serve_run

pytestmark = pytest.mark.slow

SOON_MS = 90_000
"""Timeout in ms, far more than a busy machine needs."""

PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Tiny FLUX.1 and Kontext behind Serve, with a LoRA that fits and one that does not."""
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    write_tiny_checkpoints(folder / "checkpoints")
    write_tiny_lora(folder / "loras" / "style.safetensors", seed=1)
    save_pair(folder / "loras" / "other.safetensors")
    # Inspection compares the file with the real model, which is wider.
    layer = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{layer}.lora_A.weight": np.ones((2, 3072)), f"{layer}.lora_B.weight": np.ones((3072, 2))}
    save_file(pair, folder / "loras" / "real.safetensors")
    environment = {
        "CHECKPOINTS_PATH": f"{folder}/checkpoints",
        "WORKFLOWS_BASE_PATH": f"{folder}/loras",
        "OUTPUT_BASE_PATH": f"{folder}/outputs",
    }
    with serve_run(edited_config(["flux", "flux_kontext"], port), port, folder, environment) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, service: httpx.Client) -> Iterator[Page]:
    """The page in a fresh profile. It must log no errors and send requests only to the service."""
    page = browser.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console", lambda entry: complaints.append(entry.text) if "Content Security" in entry.text else None
    )
    page.on("request", lambda asked: complaints.append(asked.url) if not own(asked.url, service) else None)
    page.set_default_timeout(SOON_MS)
    expect.set_options(timeout=SOON_MS)
    page.goto(str(service.base_url))
    yield page
    page.context.close()
    assert complaints == []


def own(url: str, service: httpx.Client) -> bool:
    return url.startswith((str(service.base_url), "blob:"))


def fill(page: Page, prompts: str, lora: str = "style.safetensors", steps: int = 4, side: int = 128) -> None:
    page.get_by_label("Path or URL").fill(lora)
    page.get_by_label("Prompts").fill(prompts)
    options = page.get_by_text("Options", exact=True)
    if not page.get_by_label("Steps").is_visible():
        options.click()
    for label, value in {"Width": side, "Height": side, "Steps": steps}.items():
        page.get_by_label(label).fill(str(value))


def submit(page: Page) -> Locator:
    """Click the button; return the card of the new job."""
    with page.expect_response("**/v1/inference") as answered:
        page.get_by_role("button", name="Generate").click()
    card = page.locator(f"#job-{answered.value.json()['request_id']}")
    expect(card).to_be_visible()
    return card


def newest(page: Page) -> Locator:
    return page.locator(f"#{page.locator('.card').first.get_attribute('id')}")


def picture_width(card: Locator) -> int:
    image = card.locator("figure img").first
    image.scroll_into_view_if_needed()
    expect(image).to_have_js_property("complete", True)
    return image.evaluate("image => image.naturalWidth")


def test_from_a_request_to_a_picture_and_another(page: Page, service: httpx.Client) -> None:
    fill(page, "a <b>red</b> fox", "real.safetensors")
    expect(page.locator(".lora .hint")).to_have_text(re.compile("rank 2.*fits flux"))
    fill(page, "a <b>red</b> fox")
    card = submit(page)
    expect(card.locator(".state")).to_have_text("Done")
    expect(card.locator("h3")).to_have_text("flux: a <b>red</b> fox")
    assert picture_width(card) == 128

    card.get_by_text("Manifest").click()
    expect(card.locator("pre")).to_contain_text("sha256")
    manifest = json.loads(card.locator("pre").inner_text())
    assert manifest["parameters"]["prompt"] == "a <b>red</b> fox"
    assert manifest["parameters"]["seed"] == 42

    card.get_by_role("button", name="Copy as curl").click()
    words = shlex.split(page.locator("#snippet").input_value())
    assert words[:3] == ["curl", "-s", f"{service.base_url}/v1/inference".replace("//v1", "/v1")]
    assert service.post("/v1/inference", json=json.loads(words[-1])).status_code == 200
    page.keyboard.press("Escape")
    card.get_by_role("button", name="Copy as Python").click()
    program = page.locator("#snippet").input_value()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'seed': 42" in done.stdout
    page.keyboard.press("Escape")

    card.get_by_role("button", name="Repeat with another seed").click()
    expect(page.locator(".card")).to_have_count(2)
    other = newest(page)
    expect(other.locator(".state")).to_have_text("Done")
    expect(other.locator("figcaption")).not_to_contain_text("seed 42")
    compare(page, card, other)


def compare(page: Page, one: Locator, other: Locator) -> None:
    """Compare the pictures of two cards using only the keyboard."""
    for card in (one, other):
        button = card.get_by_role("button", name="Compare")
        button.focus()
        page.keyboard.press("Enter")
    slider = page.get_by_role("slider")
    expect(slider).to_be_focused()
    left = page.locator("#compare-left")
    assert left.get_attribute("src") != page.locator("#compare-right").get_attribute("src")
    page.keyboard.press("Home")
    before = left.evaluate("image => getComputedStyle(image).clipPath")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "3"
    assert left.evaluate("image => getComputedStyle(image).clipPath") != before
    page.keyboard.press("Escape")
    expect(slider).to_be_hidden()


def test_a_bad_lora_is_told(page: Page) -> None:
    fill(page, "a fox", "missing.safetensors")
    expect(page.locator(".lora .hint")).to_contain_text("LORA_NOT_FOUND")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("LORA_NOT_FOUND: There is no such LoRA file")
    fill(page, "a fox", "other.safetensors")
    expect(page.locator(".lora .hint")).to_contain_text("none of them matches flux")
    card = submit(page)
    expect(card.locator(".state")).to_have_text("Failed")
    expect(card).to_contain_text("LORA_NO_MATCH")
    expect(page.locator("#refusal")).to_be_empty()


def test_a_reload_in_the_middle_of_a_job_and_its_cancel(page: Page) -> None:
    fill(page, "a long job", steps=150, side=1024)
    card = submit(page)
    expect(card).to_contain_text(re.compile(r"drawing, step \d+ of 150"))
    page.reload()
    card = page.locator(".card").first
    expect(card.locator(".state")).to_have_text("Running")
    expect(card.locator("h3")).to_have_text("flux: a long job")
    seen = card.locator(".hint").first.inner_text()
    expect(card.locator(".hint").first).not_to_have_text(seen)
    card.get_by_role("button", name="Cancel").click()
    expect(card.locator(".state")).to_have_text("Canceled")
    expect(card.get_by_role("button", name="Cancel")).to_be_hidden()


def test_an_edit_on_a_phone(page: Page, tmp_path: Path) -> None:
    (tmp_path / "sun & sea.png").write_bytes(png(160, 96))
    page.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
    page.get_by_label("Model").select_option("flux_kontext")
    page.get_by_label("Drop pictures here").set_input_files(tmp_path / "sun & sea.png")
    page.get_by_role("button", name="Remove sun & sea.png").click()
    expect(page.locator("#control-list")).to_be_empty()
    drop(page, "moon.png", png(160, 96))
    expect(page.locator("#control-list")).to_contain_text("moon.png")
    fill(page, "make it winter")
    card = submit(page)
    expect(card.locator(".state")).to_have_text("Done")
    assert picture_width(card) == 128
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    small = page.locator("button:visible").evaluate_all(
        "buttons => buttons.filter(button => button.getBoundingClientRect().height < 44).length"
    )
    assert small == 0


def drop(page: Page, name: str, data: bytes) -> None:
    make = """([name, bytes]) => {
        const dropped = new DataTransfer();
        dropped.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
        return dropped;
    }"""
    dropped = page.evaluate_handle(make, [name, list(data)])
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})


def test_the_inputs_follow_the_model(page: Page) -> None:
    model, paths = page.get_by_label("Model"), page.get_by_label("Path or URL")
    model.select_option("wan22_14b_i2v")
    expect(page.locator("#controls-about")).to_have_text("The model needs one picture.")
    expect(paths).to_have_count(2)
    paths.nth(1).fill("calm_low.safetensors")
    page.get_by_label("Prompts").fill("waves\n\n clouds ")
    page.get_by_text("Options", exact=True).click()
    page.get_by_label("Frames", exact=True).fill("17")
    page.get_by_role("button", name="Copy as curl").click()
    body = json.loads(shlex.split(page.locator("#snippet").input_value())[-1])
    page.keyboard.press("Escape")
    assert body == {
        "model": "wan22_14b_i2v",
        "loras": [{"path": "calm_low.safetensors", "transformer": "low"}],
        "prompts": [{"prompt": "waves", "num_frames": 17}, {"prompt": "clouds", "num_frames": 17}],
        "output_format": "webp",
        "sampling": "reference",
    }
    model.select_option("ltx2.3")
    expect(page.get_by_label("Resolution")).to_have_value("Default")
    model.select_option("krea2_o_edit")
    expect(page.get_by_label("kv_cache")).to_be_checked()
    expect(page.locator("#controls-about")).to_have_text("The model needs 1 to 3 pictures.")
    model.select_option("flux")
    expect(page.locator("#controls")).to_be_hidden()
    expect(paths).to_have_count(1)


def test_a_key_is_asked_for_and_kept_by_the_tab_alone(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEYS", "alice:alices-key")
    with serving(tmp_path) as keyed:
        page = browser.new_context().new_page()
        page.goto(str(keyed.client.base_url))
        key = page.get_by_label("Key", exact=True)
        for value in ("wrong", "alices-key"):
            key.fill(value)
            page.keyboard.press("Enter")
        expect(page.get_by_label("Model")).to_have_value("flux")
        page.reload()
        expect(page.get_by_label("Model")).to_have_value("flux")
        assert page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
        tab = page.context.new_page()
        tab.goto(str(keyed.client.base_url))
        expect(tab.get_by_label("Key", exact=True)).to_be_visible()
        page.context.close()
