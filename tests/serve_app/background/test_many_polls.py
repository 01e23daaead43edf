"""500 long polls or event streams on a real service, behind either proxy; other requests still work."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest
import yaml

from tests.benchmarks.load import Answers, drive, http
from tests.cluster.jobs.tables import locked
from tests.serve_app.conftest import body, save_pair
from tests.support.service import edited_config, free_port, serve_run, submit

pytestmark = pytest.mark.slow

POLLS = 500
ROOM = POLLS + 40
"""Requests that the one gateway handles at a time."""

SOON_S = 15.0
"""Seconds; far less than the requested wait, far more than a busy machine needs."""


@dataclass(frozen=True)
class Gateway:
    client: httpx.Client
    port: int
    jobs: str

    def poll(self, job_id: str, wait_s: float) -> Answers:
        """Send all long polls at once; return when all are answered."""
        request = http("GET", f"/v1/requests/{job_id}/status?wait={wait_s:g}")
        return drive(self.port, [request], POLLS, duration_s=0)

    def follow(self, job_id: str, streams: int, stack: ExitStack) -> list[Stream]:
        """Open event streams of a job; return when all have begun. `stack` closes them."""
        opened = [stack.enter_context(Stream(self.port, job_id)) for _ in range(streams)]
        for stream in opened:
            stream.read_until(b"event: queue")
        return opened


class Stream:
    """One event stream over its own connection."""

    def __init__(self, port: int, job_id: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.sendall(http("GET", f"/v1/requests/{job_id}/events"))
        self.received = b""

    def read_until(self, text: bytes) -> None:
        while text not in self.received:
            piece = self._socket.recv(65536)
            assert piece, f"the stream has ended: {self.received!r}"
            self.received += piece

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.fixture(scope="module", params=["default", "haproxy"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder, port = tmp_path_factory.mktemp("polls"), free_port()
    (folder / "loras").mkdir()
    save_pair(folder / "loras" / "style.safetensors")
    config = yaml.safe_load(edited_config(["flux"], port))
    config["applications"] = config["applications"][:1]  # No worker is needed.
    (options,) = config["applications"][0]["deployments"]
    options["max_ongoing_requests"] = ROOM
    options["autoscaling_config"]["max_replicas"] = 1
    jobs = f"sqlite:///{folder}/jobs.db"
    environment = {
        "JOBS_URL": jobs,
        "WORKFLOWS_BASE_PATH": f"{folder}/loras",
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(request.param == "haproxy")),
    }
    with serve_run(yaml.safe_dump(config), port, folder, environment) as client:
        yield Gateway(client, port, jobs)


def test_all_are_answered_when_the_job_ends_and_others_meanwhile(gateway: Gateway) -> None:
    job_id = submit(gateway.client, body())
    with ThreadPoolExecutor(1) as pool:
        polls = pool.submit(gateway.poll, job_id, 60)
        time.sleep(4)
        begun = time.monotonic()
        status = gateway.client.get(f"/v1/requests/{job_id}/status")
        assert '"in_queue"' in status.text, status.text
        submit(gateway.client, body())
        assert time.monotonic() - begun < SOON_S
        assert not polls.done()
        assert gateway.client.delete(f"/v1/requests/{job_id}").status_code == 200
        ended = time.monotonic()
        answers = polls.result()
        assert time.monotonic() - ended < SOON_S
    assert answers.statuses == {200: POLLS}
    assert answers.ids == [job_id] * POLLS
    assert min(answers.seconds) > 1, "some did not wait"


def test_all_are_answered_when_their_time_is_over(gateway: Gateway) -> None:
    job_id = submit(gateway.client, body())
    answers = gateway.poll(job_id, 3)
    assert answers.statuses == {200: POLLS}
    assert 3 <= min(answers.seconds) <= max(answers.seconds) < 3 + SOON_S


def test_a_lost_store_is_told_through_the_proxy(gateway: Gateway) -> None:
    assert gateway.client.get("/ready").status_code == 200
    with locked(gateway.jobs):
        answer = gateway.client.get("/ready")
        assert gateway.client.get("/health").status_code == 200
        assert gateway.client.get("/-/healthz").status_code == 200
    assert answer.status_code == 503
    assert answer.json()["detail"]["error"]["code"] == "STORE_UNAVAILABLE"
    assert answer.headers["retry-after"] == "1"


def test_all_streams_are_told_and_others_meanwhile(gateway: Gateway) -> None:
    job_id = submit(gateway.client, body())
    with ExitStack() as stack:
        streams = gateway.follow(job_id, POLLS, stack)
        begun = time.monotonic()
        assert gateway.client.get(f"/v1/requests/{job_id}/status").json()["status"] == "in_queue"
        assert gateway.client.delete(f"/v1/requests/{job_id}").status_code == 200
        for stream in streams:
            stream.read_until(b'"status":"canceled"')
        assert time.monotonic() - begun < SOON_S


def test_streams_whose_clients_went_away_take_no_room(gateway: Gateway) -> None:
    """Open more streams than the gateway has room for: leaked ones would block the last."""
    job_id = submit(gateway.client, body())
    for _ in range(3):
        with ExitStack() as stack:
            gateway.follow(job_id, ROOM // 3 + 1, stack)
    assert gateway.client.delete(f"/v1/requests/{job_id}").status_code == 200
