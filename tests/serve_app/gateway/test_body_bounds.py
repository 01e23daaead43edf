"""Large bodies are refused while they stream in, and cost little work."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve_app.conftest import Service, body, png, serving

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gateway that takes bodies of at most 4 KiB."""
    with serving(tmp_path_factory.mktemp("small"), max_body_bytes=4096) as service:
        yield service


def padded(size: int) -> bytes:
    """Return a valid request of exactly `size` bytes."""
    text = json.dumps(body())
    return (text + " " * (size - len(text))).encode()


def refused_for(answer: httpx.Response, **details: int) -> bool:
    error = answer.json()["detail"]["error"]
    return (answer.status_code, error["code"], error["details"]) == (413, "BODY_TOO_LARGE", details)


def test_a_body_of_the_bound_is_taken_and_one_byte_more_is_not(small: Service) -> None:
    assert small.client.post("/v1/inference", content=padded(4096), headers=JSON).status_code == 200
    before = small.stored
    answer = small.client.post("/v1/inference", content=padded(4097), headers=JSON)
    assert refused_for(answer, max_bytes=4096)
    assert small.stored == before


def test_a_body_without_length_is_cut_off_while_it_streams(small: Service) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 2**24:
            sent += 1024
            yield b" " * 1024
            time.sleep(0.0001)

    assert refused_for(small.client.post("/v1/inference", content=endless(), headers=JSON), max_bytes=4096)
    assert sent < 2**24


def test_a_chunked_body_within_the_bound_is_taken(small: Service) -> None:
    pieces = [padded(2000)[index : index + 100] for index in range(0, 2000, 100)]
    answer = small.client.post("/v1/inference", content=iter(pieces), headers=JSON)
    assert answer.status_code == 200


def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(service: Service) -> None:
    answer = service.client.post("/v1/inference", content=b'{"x":[' + b"[]," * 10**6 + b"0]}", headers=JSON)
    assert refused_for(answer, max_values=250_000)


def test_a_long_text_is_no_large_body(service: Service) -> None:
    answer = service.post(body(prompt={"prompt": "x" * 30_000_000}))
    assert answer.json()["detail"]["error"]["code"] == "PROMPT_TOO_LONG"


def test_the_event_loop_answers_others_while_a_large_picture_is_decoded(service: Service) -> None:
    """33 million pixels take about a second to decode, which must not block the event loop."""
    picture = base64.b64encode(png(8192, 4096)).decode()
    request = body(model="flux_kontext", prompt={"ctrl_img": picture})
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(service.post(request).status_code))
    answers = 0
    with httpx.Client(base_url=service.client.base_url) as other:
        thread.start()
        while thread.is_alive():
            assert other.get("/health").status_code == 200
            answers += 1
    thread.join()
    assert codes == [200]
    assert answers > 20


def test_several_large_pictures_at_once_are_all_admitted(service: Service, tmp_path: Path) -> None:
    request = body(model="flux_kontext", prompt={"ctrl_img": base64.b64encode(png(2048, 2048)).decode()})
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(service.post(request).status_code)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 6
    assert len([path for path in service.stored[1] if "inputs" in path.parts]) == 2
