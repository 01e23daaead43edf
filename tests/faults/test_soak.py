"""Random faults for half an hour. Run by hand: `pytest -m soak`; `SOAK_S` sets the duration in seconds."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress

import pytest

from cluster.jobs.model import JobState
from tests.cluster.jobs.tables import locked
from tests.faults.service import MODELS, Service, body, kill_unless_last_attempt, long_body
from tests.support.s3 import Proxy, passed_on, refused
from tests.support.service import replica_pids, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(0)]

SOAK_S = float(os.environ.get("SOAK_S", "1800"))


def test_a_model_whose_first_replicas_die_starts_again(service: Service) -> None:
    job_id = service.submit(body("sd15"))
    killed: set[int] = set()
    for _ in range(3):  # Enough for Serve to give the version up.
        (worker, *_) = wait_until(lambda: set(replica_pids("sd15")) - killed, 60, "a replica that starts")
        os.kill(worker, signal.SIGKILL)
        killed.add(worker)
    assert service.kept(time.time(), timeout_s=400)[job_id].state is JobState.SUCCEEDED


def test_a_soak(service: Service, proxy: Proxy) -> None:
    dice, began_at, end = random.Random(), time.time(), time.monotonic() + SOAK_S

    def kill_worker() -> None:
        model = dice.choice(MODELS)
        if replica_pids(model):
            kill_unless_last_attempt(service, model)

    def stop_worker() -> None:
        for pid in replica_pids(dice.choice(MODELS)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(2 * service.lease_s)
                os.kill(pid, signal.SIGCONT)

    def kill_gateway() -> None:
        os.kill(service.gateway(), signal.SIGKILL)
        wait_until(service.answers, 60, "the gateway's return")

    def refuse_objects() -> None:
        proxy.otherwise = refused
        proxy.cut()
        time.sleep(dice.uniform(0, 5))
        proxy.otherwise = passed_on

    def lock_table() -> None:
        with locked(os.environ["JOBS_URL"]):
            time.sleep(dice.uniform(0, 3 * service.lease_s))

    faults = (kill_worker, kill_worker, stop_worker, kill_gateway, refuse_objects, lock_table)
    while time.monotonic() < end:
        if service.queue.waiting("")[0] < 6:
            model = dice.choice(MODELS)
            service.submit(long_body(model, steps=dice.randint(20, 60), prompts=dice.randint(1, 2)))
            service.submit(body(model))
        time.sleep(dice.uniform(0, 6))
        dice.choice(faults)()
    states = [job.state for job in service.kept(began_at, timeout_s=900).values()]
    # Three faults in a row may fail a job, but only rarely.
    assert states.count(JobState.SUCCEEDED) > 0.9 * len(states)
