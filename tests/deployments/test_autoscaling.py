"""The autoscaling policy on a real job table, inside the wrapper of Serve's controller."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from sqlalchemy import update

from cluster.databases.database import open_database
from cluster.jobs import depth_reader as load
from cluster.jobs.model import JobState, NewJob
from cluster.jobs.queue import JobQueue
from cluster.jobs.schema import jobs
from deployments import autoscaling
from deployments.autoscaling import YIELD_AFTER_S, YIELD_BUSY_AFTER_S, QueuePolicy
from serve_app.deployment_options import worker_options
from tests.support.service import wait_until


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("JOBS_URL", raising=False)
    return f"sqlite:///{tmp_path}/jobs.db"


@pytest.fixture
def queue(url: str) -> Iterator[JobQueue]:
    queue = JobQueue(url)
    yield queue
    queue.close()


def submit(queue: JobQueue, model: str) -> str:
    job = NewJob(id=str(uuid.uuid4()), model=model, spec={}, adapter="a")
    return queue.submit([job])[0].id


def context(current: int, target: int, **delays: float) -> AutoscalingContext:
    config = AutoscalingConfig(min_replicas=0, max_replicas=4, upscale_delay_s=0, **delays)  # type: ignore[arg-type]
    return AutoscalingContext(
        deployment_id=DeploymentID(name="flux", app_name="flux"),
        deployment_name="flux",
        app_name="flux",
        current_num_replicas=current,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics=None,
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=config,
    )


def deploy(url: str, model: str) -> None:
    """Call a model's policy once, as Serve does while the model is deployed."""
    QueuePolicy(model, url)(context(0, 0))


def decided(policy: Callable[[AutoscalingContext], tuple[int, dict]], **fields: float) -> int:
    """Return Serve's decision: the policy inside Serve's own wrapper of factors and delays."""
    current = int(fields.pop("current", 0))
    target = int(fields.pop("target", current))
    return _apply_autoscaling_config(policy)(context(current, target, **fields))[0]


def test_a_waiting_job_brings_a_replica_at_once(queue: JobQueue, url: str) -> None:
    policy = QueuePolicy("flux", url)
    submit(queue, "flux")
    wait_until(lambda: decided(policy) == 1, 5, "the first replica")


def test_running_jobs_count(queue: JobQueue, url: str) -> None:
    policy = QueuePolicy("flux", url)
    for _ in range(3):
        submit(queue, "flux")
    assert queue.claim("flux", "worker") is not None
    wait_until(lambda: decided(policy, current=1) == 3, 5, "a replica per waiting or running job")
    claims = [queue.claim("flux", "worker") for _ in range(2)]
    assert all(claims)
    wait_until(lambda: queue.depths()["flux"].queued == 0, 5, "an empty queue")
    assert decided(policy, current=3, downscale_delay_s=0.0) == 3


def test_an_idle_model_keeps_its_replica_for_the_delay(queue: JobQueue, url: str) -> None:
    policy = QueuePolicy("flux", url)
    wait_until(lambda: policy(context(1, 1))[0] == 0, 5, "a reading")
    assert decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 1


def test_an_idle_model_yields_at_once_to_one_that_waits_without_replica(queue: JobQueue, url: str) -> None:
    policy = QueuePolicy("flux", url)
    deploy(url, "sdxl")
    submit(queue, "sdxl")
    wait_until(lambda: queue.depths()["sdxl"].queued == 1, 5, "the waiting job")
    # Not yet: a replica of the other model may be starting.
    assert decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 1
    grow_old(url, 2 * YIELD_AFTER_S)
    wait_until(lambda: decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 0, 5, "yielding")
    queue.announce("sdxl@host:1:a", "sdxl", ())
    wait_until(lambda: decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 1, 5, "no more need")


def test_a_model_does_not_grow_while_another_waits_for_its_first_replica(queue: JobQueue, url: str) -> None:
    policy = QueuePolicy("flux", url)
    deploy(url, "sdxl")
    submit(queue, "sdxl")
    for _ in range(3):
        submit(queue, "flux")
    wait_until(lambda: decided(policy, current=1) == 3, 5, "growth while nobody starves")
    grow_old(url, 2 * YIELD_AFTER_S)
    wait_until(lambda: decided(policy, current=1, target=3, downscale_delay_s=300.0) == 1, 5, "restraint")
    assert decided(policy, current=0) == 1


def grow_old(url: str, seconds: float) -> None:
    """Make the jobs in the table that many seconds older."""
    with open_database(url).write() as connection:
        connection.execute(update(jobs).values(created_at=jobs.c.created_at - seconds))


def test_a_busy_model_does_not_yield_at_once(queue: JobQueue, url: str) -> None:
    policy = QueuePolicy("flux", url)
    deploy(url, "sdxl")
    submit(queue, "sdxl")
    submit(queue, "flux")
    claim = queue.claim("flux", "worker")
    assert claim is not None
    grow_old(url, 2 * YIELD_AFTER_S)
    wait_until(lambda: policy(context(1, 9))[0] == 1, 5, "a reading")
    assert decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 1
    queue.finish(claim, JobState.SUCCEEDED)
    wait_until(lambda: decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 0, 5, "yielding")


def test_a_busy_model_yields_one_replica_to_a_job_that_waited_long(queue: JobQueue, url: str) -> None:
    flux, sdxl = QueuePolicy("flux", url), QueuePolicy("sdxl", url)
    deploy(url, "sd15")
    submit(queue, "sd15")
    for model in ("flux", "flux", "flux", "sdxl"):
        submit(queue, model)
        assert queue.claim(model, f"{model}-{uuid.uuid4()}", patience_s=0) is not None
    grow_old(url, 2 * YIELD_BUSY_AFTER_S)
    submit(queue, "flux")
    served = {"phase": "serving", "since": time.time() - 2 * YIELD_BUSY_AFTER_S}
    first = context(3, 3)
    first.policy_state = served
    wait_until(lambda: "most" in flux(first)[1], 5, "yielding")
    assert flux(context(3, 3))[0] == 3, "its turn has only just begun"
    desired, state = flux(first)
    assert (desired, state["most"]) == (2, 2)
    # One replica drains and the other model's starts: no more is given up until then.
    serve = context(2, 2)
    serve.policy_state = state
    assert flux(serve) == (2, state)
    fewer = context(1, 1)
    fewer.policy_state = served
    assert sdxl(fewer)[0] == 1, "the other model has more replicas to give up"
    queue.announce("sd15@host:1:a", "sd15", ())
    wait_until(lambda: flux(serve) == (4, served), 5, "no more need")


def test_who_waits_in_vain_for_a_first_replica_asks_anew(
    queue: JobQueue, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, serve = QueuePolicy("flux", url), _apply_autoscaling_config(QueuePolicy("flux", url))
    submit(queue, "flux")
    wait_until(lambda: decided(policy) == 1, 5, "a reading")
    monkeypatch.setattr(autoscaling, "START_AGAIN_S", 0.5)
    asked, waiting = [], context(0, 1, downscale_to_zero_delay_s=300.0)
    for _ in range(20):
        desired, waiting.policy_state = serve(waiting)
        asked.append(desired)
        time.sleep(0.1)
    assert set(asked) == {0, 1}
    assert asked.count(0) < 5
    queue.announce("flux@host:1:a", "flux", ())
    wait_until(lambda: queue.depths()["flux"].workers, 5, "the replica")
    time.sleep(1)
    assert all(serve(waiting)[0] == 1 for _ in range(5)), "the policy waits for an announced replica"


def test_jobs_of_a_model_that_is_not_deployed_make_nobody_yield(queue: JobQueue, url: str) -> None:
    policy = QueuePolicy("flux", url)
    submit(queue, "sdxl")
    for _ in range(3):
        submit(queue, "flux")
    grow_old(url, 2 * YIELD_BUSY_AFTER_S)
    wait_until(lambda: decided(policy, current=1) == 3, 5, "growth")


def test_replica_counts_stay_while_the_table_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOBS_URL", raising=False)
    (tmp_path / "jobs.db").mkdir()  # No database can be opened there.
    policy = QueuePolicy("flux", f"sqlite:///{tmp_path}/jobs.db")
    assert decided(policy, current=2, downscale_delay_s=0.0) == 2


def test_the_policy_travels_as_serve_sends_it(queue: JobQueue, url: str) -> None:
    options = worker_options("flux", url)["autoscaling_config"]["policy"]
    policy = AutoscalingPolicy(**options)
    restored = policy.get_policy()
    submit(queue, "flux")
    made = restored(**policy.policy_kwargs)
    wait_until(lambda: decided(made) == 1, 5, "a decision of the restored policy")


def test_a_table_of_which_nobody_asks_is_not_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "STALE_S", 0.5)
    monkeypatch.setattr(load, "DEPLOYED_S", 0.5)
    reader = load.LoadReader(url)
    wait_until(lambda: reader.latest("flux") is not None, 5, "a reading")
    time.sleep(1.5)
    assert reader.latest("flux") is None
    wait_until(lambda: reader.latest("flux") is not None, 5, "a reading again")
