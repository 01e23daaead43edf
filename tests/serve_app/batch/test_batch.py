"""Batches of the client on a real gateway; the test acts as the worker."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster.jobs.model import JobState
from serve_app.batch import batch as batch_module
from serve_app.batch.batch import Batch
from serve_app.client import LoraServe, Refused
from tests.serve_app.conftest import Service, base64_png, png, serving
from tests.support.service import free_port, wait_until

ROWS = [{"prompt": f"a fox {index}", "width": 64, "height": 64} for index in range(3)]
GRID: dict[str, Any] = {"model": "flux", "loras": ["style.safetensors"], "multipliers": [0.5, 1.0]}


@pytest.fixture
def client(fresh: Service) -> Iterator[LoraServe]:
    with LoraServe(str(fresh.client.base_url)) as client:
        yield client


def work(service: Service, jobs: int, *, failing: int = 0) -> None:
    """Render `jobs` jobs, the first `failing` of which fail."""
    for index in range(jobs):
        claim = service.queue.claim("flux", "worker-1")
        assert claim is not None
        if index < failing:
            service.queue.finish(claim, JobState.FAILED, error="It broke.", error_code="OUT_OF_MEMORY")
        else:
            service.publish(claim)


def test_it_loads_neither_torch_nor_ray_nor_pandas() -> None:
    heavy = "{'torch', 'ray', 'pandas', 'pyarrow', 'tqdm'}"
    code = (
        f"import sys, serve_app.batch.batch, serve_app.client.ray_client; print({heavy} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_grid_is_submitted_rendered_retried_and_found_again(fresh: Service, client: LoraServe) -> None:
    batch = Batch(client).submit(ROWS, **GRID, chunk=4, progress=False)
    assert batch.counts().total == 6
    work(fresh, 6, failing=2)
    assert batch.wait(progress=False).failed == 2
    frame = Batch(client, batch.id).frame()
    assert list(frame["status"]) == ["failed"] * 2 + ["succeeded"] * 4
    assert list(frame["multiplier"]) == [0.5, 1.0] * 3
    assert list(frame["prompt"]) == [row["prompt"] for row in ROWS for _ in range(2)]
    assert set(frame["lora"]) == {"style.safetensors"} and set(frame["seed"]) == {42}
    assert list(frame["error_code"][:2]) == ["OUT_OF_MEMORY"] * 2
    rows = frame.to_dict("records")
    assert all(row["url"].startswith(fresh.settings.base_url) for row in rows[2:])
    assert all(row["waited_s"] >= 0 and row["ran_s"] >= 0 for row in rows)
    assert [row["inference_s"] for row in rows[2:]] == [1.5] * 4
    assert batch.retry(progress=False) == 2
    assert batch.retry(progress=False) == 0
    work(fresh, 2)
    assert batch.wait(progress=False).succeeded == 6
    assert list(batch.frame()["status"]) == ["succeeded"] * 6


def test_a_retry_of_many_comes_in_pieces(
    fresh: Service, client: LoraServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "CHUNK", 2)
    batch = Batch(client).submit(ROWS, **GRID, seeds=[1], progress=False)
    work(fresh, 6, failing=5)
    assert batch.retry(progress=False) == 5
    assert (batch.counts().failed, batch.counts().in_queue) == (0, 5)


def test_the_same_table_again_adds_only_what_is_missing(fresh: Service, client: LoraServe) -> None:
    repeated = [ROWS[0]] * 5
    whole = Batch(client)
    with pytest.raises(ValueError, match="no rows"):
        whole.submit([], **GRID)
    # Like a process that died after its second chunk of three.
    part = Batch(client, whole.id).submit(repeated[:4], model="flux", lora="style.safetensors", chunk=2)
    assert part.counts().total == 4
    for _ in range(2):
        whole.submit(repeated, model="flux", lora="style.safetensors", chunk=2, progress=False)
        assert whole.counts().total == 5
    whole.submit(ROWS, **GRID, progress=False)
    assert whole.counts().total == 11


def test_pictures_cut_a_table_by_bytes(
    fresh: Service, client: LoraServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "control.png").write_bytes(png(32, 32))
    monkeypatch.setattr(batch_module, "CHUNK_BYTES", 3 * len(base64_png(32, 32)))
    sent: list[int] = []
    send = client.send
    monkeypatch.setattr(
        client,
        "send",
        lambda *a, **k: sent.append(len(k.get("body", {}).get("requests", ()))) or send(*a, **k),
    )
    rows = [{"prompt": str(index), "ctrl_img": tmp_path / "control.png"} for index in range(5)]
    rows += [{"prompt": "own", "ctrl_img": Image.new("RGB", (32, 32))}]
    batch = Batch(client).submit(rows, model="flux_kontext", lora="style.safetensors", progress=False)
    assert sum(sent) == 6 and max(sent) < 4
    assert [result.prompts[0].prompt for result in batch.results()] == ["0", "1", "2", "3", "4", "own"]


def test_a_refused_row_is_named(fresh: Service, client: LoraServe) -> None:
    rows = [*ROWS, {"prompt": "bad", "lora": "missing.safetensors"}]
    batch = Batch(client)
    with pytest.raises(Refused) as caught:
        batch.submit(rows, model="flux", lora="style.safetensors", chunk=2, progress=False)
    assert caught.value.code == "BATCH_REFUSED"
    assert "request 3: LORA_NOT_FOUND" in caught.value.__notes__[0]
    assert "missing.safetensors" in caught.value.__notes__[0]
    assert batch.counts().total == 2


def test_columns_that_no_request_has_are_told(fresh: Service, client: LoraServe) -> None:
    with pytest.warns(UserWarning, match="ignored unknown columns: hight, note"):
        Batch(client).submit([{"prompt": "a", "note": 1, "hight": 2}], model="flux", lora="style.safetensors")


def test_cancel_and_an_unknown_batch(fresh: Service, client: LoraServe) -> None:
    batch = Batch(client).submit(ROWS, **GRID, progress=False)
    assert batch.cancel().canceled == 6
    assert batch.wait(progress=False).ended == 6
    with pytest.raises(Refused, match="BATCH_NOT_FOUND"):
        Batch(client).counts()
    with pytest.raises(ValueError, match="badly formed"):
        Batch(client, "mine")


def test_wait_shows_progress_and_gives_up_in_time(
    fresh: Service, client: LoraServe, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "POLL_S", 0.05)
    batch = Batch(client).submit(ROWS, **GRID)
    work(fresh, 2, failing=1)
    assert batch.wait(timeout_s=0.3).ended == 2
    shown = capfd.readouterr().err
    assert "submitted: 100%" in shown and "2/6" in shown and "failed=1" in shown
    worker = threading.Thread(target=work, args=(fresh, 4))
    worker.start()
    assert batch.wait().ended == 6
    worker.join()
    assert "6/6" in capfd.readouterr().err


def test_a_full_queue_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "POLL_S", 0.05)
    with (
        serving(tmp_path, max_queued=4) as service,
        # Retry-After is 10 s; this patience ends long before.
        LoraServe(str(service.client.base_url), patience_s=0.2) as client,
    ):
        options: dict[str, Any] = {**GRID, "multipliers": [1.0], "progress": False}
        batch = Batch(client).submit(ROWS, **options)
        seeds = {"seeds": [3, 4], "chunk": 3}
        submitting = threading.Thread(
            target=batch.submit, args=(ROWS,), kwargs={**options, **seeds}, daemon=True
        )
        submitting.start()
        for total in (3, 6):
            time.sleep(0.3)
            assert batch.counts().total == total and submitting.is_alive()
            work(service, 3)
            wait_until(lambda total=total: batch.counts().total == total + 3, 30, "the next chunk")
        submitting.join(30)
        with pytest.raises(Refused, match="BATCH_TOO_LARGE"):
            batch.submit(ROWS, **{**options, "seeds": [5, 6]})


def test_a_contact_sheet_has_every_picture_and_says_what_failed(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving(tmp_path, port=port, base_url=url) as service, LoraServe(url) as client:
        batch = Batch(client).submit(ROWS, **GRID, progress=False)
        work(service, 4, failing=1)
        sheet = batch.sheet(columns=3, side=100)
        small = batch.sheet(columns=9, side=50, most=2)
    assert sheet.size == (3 * 108 + 8, 2 * (108 + 48) + 8)
    assert small.size == (2 * 58 + 8, 58 + 48 + 8)
    places = [(38 + column * 108, 48 + row * 156) for row in (0, 1) for column in (0, 1, 2)]
    grey, pink = (211, 211, 211), (200, 30, 90)
    assert [sheet.getpixel(place) for place in places] == [grey, pink, pink, pink, grey, grey]
    for column in range(3):
        label = sheet.crop((8 + column * 108, 108, 108 + column * 108, 156)).convert("L")
        assert min(label.tobytes()) < 100, "each picture needs a label below it"
