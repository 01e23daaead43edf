"""The blocking and the async Python client on a real gateway."""

from __future__ import annotations

import hashlib
import io
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from PIL import Image

from cluster.jobs.model import JobState
from serve_app.client import (
    AsyncLoraServe,
    JobFailed,
    LoraServe,
    LoraServeError,
    Refused,
    Result,
    Status,
    WaitTimeout,
)
from serve_app.wire.requests import InferenceRequest
from tests.serve_app.conftest import Service, body, kontext_body, png, rendering, serving
from tests.support.service import free_port

Connect = Callable[..., LoraServe]


class _InLoop:
    """The async client, called from this thread."""

    def __init__(self, portal: BlockingPortal, *arguments: Any, **options: Any) -> None:
        self._portal = portal
        self._twin = AsyncLoraServe(*arguments, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._twin, name)
        return lambda *arguments, **options: self._portal.call(partial(method, *arguments, **options))


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """A factory of clients of either kind; tests use both the same way."""
    clients: list[LoraServe] = []
    with start_blocking_portal() as portal:

        def make(*arguments: Any, **options: Any) -> LoraServe:
            if request.param == "blocking":
                clients.append(LoraServe(*arguments, **options))
            else:
                clients.append(cast("LoraServe", _InLoop(portal, *arguments, **options)))
            return clients[-1]

        yield make
        for client in clients:
            client.close()


@pytest.fixture(scope="module")
def url() -> str:
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, url: str) -> Iterator[Service]:
    """A gateway whose answers contain its own port."""
    port = int(url.rpartition(":")[2])
    with serving(tmp_path_factory.mktemp("service"), port, base_url=url) as running:
        yield running


def small(**prompt: Any) -> dict[str, Any]:
    return body(prompt={"width": 64, "height": 80, **prompt})


def test_generate_returns_the_pictures_and_tells_the_way(
    service: Service, url: str, connect: Connect
) -> None:
    seen: list[Status] = []
    before = random.getstate()
    with rendering(service):
        (picture,) = connect(url).generate(small(), on_status=seen.append, timeout_s=30)
    assert isinstance(picture, Image.Image)
    assert picture.tobytes() == Image.open(io.BytesIO(png(64, 80))).tobytes()
    assert seen[-1].status is JobState.SUCCEEDED and seen[-1].ended
    assert random.getstate() == before


def test_videos_are_saved_and_their_paths_returned(
    service: Service, url: str, connect: Connect, tmp_path: Path
) -> None:
    client = connect(url)
    request = InferenceRequest.model_validate(body(model="wan21_1b"))

    def render() -> None:
        while (claim := service.queue.claim("wan21_1b", "worker-1")) is None:
            pass
        output = {"kind": "video", "format": "webp", "width": 64, "height": 80, "num_frames": 5, "fps": 16}
        output |= {"seed": 42, "key": f"{claim.job.id}/1/0.webp", "manifest_key": f"{claim.job.id}/1/0.json"}
        service.store.put(output["key"], b"a video", "image/webp")
        service.queue.record_output(
            claim, 0, output | {"sha256": hashlib.sha256(b"a video").hexdigest(), "bytes": 7}
        )
        service.queue.finish(claim, JobState.SUCCEEDED, result={})

    worker = threading.Thread(target=render)
    worker.start()
    (path,) = client.generate(request, tmp_path / "videos")
    worker.join()
    assert isinstance(path, Path) and path.read_bytes() == b"a video"
    assert path.parent == tmp_path / "videos" and path.name.endswith("-0.webp")


def test_a_key_makes_one_job_and_no_key_makes_two(service: Service, url: str, connect: Connect) -> None:
    client = connect(url)
    one, two = (client.submit(small(), idempotency_key=f"{connect}") for _ in range(2))
    other, another = client.submit(small()), client.submit(small())
    assert one == two and len({one.request_id, other.request_id, another.request_id}) == 3
    for submitted in (one, other, another):
        assert client.cancel(submitted.request_id).status is JobState.CANCELED
        assert client.cancel(submitted.request_id).status is JobState.CANCELED


def test_control_images_are_files_or_pictures(
    service: Service, url: str, connect: Connect, tmp_path: Path
) -> None:
    client = connect(url)
    (tmp_path / "control.png").write_bytes(png())
    in_base64 = client.submit(kontext_body(), idempotency_key=f"{connect} control")
    request = kontext_body(ctrl_img=tmp_path / "control.png")
    assert client.submit(request, idempotency_key=f"{connect} control") == in_base64
    assert client.submit(kontext_body(ctrl_img=Image.new("RGB", (24, 16)))).warnings == ()
    with pytest.raises(TypeError):
        client.submit(kontext_body(ctrl_img=b"bytes"))


def test_refusals_are_told_with_code_and_details(service: Service, url: str, connect: Connect) -> None:
    client = connect(url)
    with pytest.raises(Refused) as caught:
        client.submit(body(model="nothing"))
    error = caught.value
    assert (error.status, error.code) == (400, "MODEL_NOT_FOUND") and "flux" in error.details[
        "supported_models"
    ]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.details) == (str(error), error.details) and error.message in str(error)
    with pytest.raises(Refused) as caught:
        client.submit({"model": "flux", "prompts": []})
    assert caught.value.code == "VALIDATION_ERROR" and "body.loras" in caught.value.message
    assert {item["loc"][1] for item in caught.value.details["errors"]} == {"loras", "prompts"}
    for ask in (client.status, client.result, client.cancel, client.wait):
        with pytest.raises(Refused) as caught:
            ask("nothing")
        assert caught.value.code == "REQUEST_NOT_FOUND"


def test_failed_canceled_and_unfinished_jobs(service: Service, url: str, connect: Connect) -> None:
    client = connect(url)
    job_id = client.submit(body(model="sd15")).request_id
    with pytest.raises(WaitTimeout) as caught:
        client.wait(job_id, timeout_s=0.3)
    assert caught.value.details["status"] == "in_queue"
    claim = service.claim(job_id)
    service.queue.finish(claim, JobState.FAILED, error="no file", error_code="LORA_NOT_FOUND")
    status = client.wait(job_id)
    assert (status.status, status.error_code, status.error) == (JobState.FAILED, "LORA_NOT_FOUND", "no file")
    assert client.result(job_id).outputs is None
    with pytest.raises(Refused) as refused:
        client.cancel(job_id)
    assert refused.value.code == "JOB_ALREADY_FINISHED"


def test_generate_raises_what_the_job_failed_with(service: Service, url: str, connect: Connect) -> None:
    client = connect(url)

    def fail_it(status: Status) -> None:
        if not status.ended and status.status is JobState.IN_QUEUE:
            claim = service.claim(status.request_id)
            service.queue.finish(claim, JobState.FAILED, error="too big", error_code="OUT_OF_MEMORY")

    with pytest.raises(JobFailed) as failed:
        client.generate(body(model="sdxl"), on_status=fail_it)
    assert (failed.value.code, failed.value.message) == ("OUT_OF_MEMORY", "too big")
    with pytest.raises(JobFailed) as failed:
        client.generate(body(model="sdxl"), on_status=lambda status: service.queue.cancel(status.request_id))
    assert failed.value.code == "CANCELED"


def test_map_keeps_order_and_bound(
    service: Service, url: str, connect: Connect, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [small(seed=n) if n != 3 else body(model="nothing") for n in range(12)]
    depths: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            jobs = service.queue.list(None, model="flux", limit=50)
            depths.append(sum(not job.state.terminal for job in jobs))

    watcher = threading.Thread(target=watch)
    with rendering(service):
        watcher.start()
        found = connect(url).map(requests, concurrency=3)
        over.set()
        watcher.join()
    assert "12/12" in capsys.readouterr().out
    assert 1 <= max(depths) <= 3
    for index, made in enumerate(found):
        if index == 3:
            assert isinstance(made, LoraServeError) and made.code == "MODEL_NOT_FOUND"
        else:
            assert isinstance(made, Result) and made.outputs is not None
            assert [output.seed for output in made.outputs.files] == [index]


def test_models(service: Service, url: str, connect: Connect) -> None:
    rows = {model.id: model for model in connect(url).models()}
    assert rows["flux"].output_formats == ("jpeg", "png", "webp") and rows["wan21_1b"].is_video_model


def test_the_key_is_sent_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connect: Connect
) -> None:
    key = "k" * 40
    monkeypatch.setenv("API_KEYS", f"alice:{key}")
    with serving(tmp_path) as service:
        url = str(service.client.base_url)
        assert connect(url, key).models()
        with pytest.raises(Refused) as caught:
            connect(url).models()
        assert (caught.value.status, caught.value.code) == (401, "API_KEY_REQUIRED")


@pytest.mark.parametrize(
    "url", ["host:8000", "ftp://host", "http://", "http://me:secret@host", "http://h?a=b", "http://h:x"]
)
def test_only_addresses_of_servers_are_taken(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        LoraServe(url)


@pytest.mark.parametrize("key", ["", "se cret", "secret\n", "sécret"])
def test_a_bad_key_is_told_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="api_key must be") as caught:
        LoraServe("http://host", key)
    assert "cret" not in str(caught.value)
