"""The policy on a real job table, inside the wrapper that Serve's controller puts around it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from sqlalchemy import update

from cluster.database import open_database
from cluster.jobs import JobState, NewJob
from cluster.queue import JobQueue
from cluster.schema import jobs
from deployments.autoscaling import YIELD_AFTER_S, QueuePolicy
from serve_app.numbers import worker_options
from tests.service import wait_until


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


def decided(policy: Callable[[AutoscalingContext], tuple[int, dict]], **fields: float) -> int:
    """What Serve would do: the policy within Serve's own wrapper of factors and delays."""
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
    submit(queue, "sdxl")
    wait_until(lambda: queue.depths()["sdxl"].queued == 1, 5, "the waiting job")
    # Not yet: a replica of the other model may be starting.
    assert decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 1
    with open_database(url).write() as connection:
        connection.execute(update(jobs).values(created_at=jobs.c.created_at - 2 * YIELD_AFTER_S))
    wait_until(lambda: decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 0, 5, "yielding")
    queue.announce("sdxl@host:1:a", "sdxl", ())
    wait_until(lambda: decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 1, 5, "no more need")


def test_a_model_does_not_grow_while_another_waits_for_its_first_replica(queue: JobQueue, url: str) -> None:
    policy = QueuePolicy("flux", url)
    submit(queue, "sdxl")
    for _ in range(3):
        submit(queue, "flux")
    wait_until(lambda: decided(policy, current=1) == 3, 5, "growth while nobody starves")
    with open_database(url).write() as connection:
        connection.execute(update(jobs).values(created_at=jobs.c.created_at - 2 * YIELD_AFTER_S))
    wait_until(lambda: decided(policy, current=1, target=3, downscale_delay_s=300.0) == 1, 5, "restraint")
    assert decided(policy, current=0) == 1


def test_a_busy_model_does_not_yield(queue: JobQueue, url: str) -> None:
    policy = QueuePolicy("flux", url)
    submit(queue, "sdxl")
    submit(queue, "flux")
    claim = queue.claim("flux", "worker")
    assert claim is not None
    with open_database(url).write() as connection:
        connection.execute(update(jobs).values(created_at=jobs.c.created_at - 2 * YIELD_AFTER_S))
    wait_until(lambda: policy(context(1, 1))[0] == 1, 5, "a reading")
    assert decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 1
    queue.finish(claim, JobState.SUCCEEDED)
    wait_until(lambda: decided(policy, current=1, downscale_to_zero_delay_s=300.0) == 0, 5, "yielding")


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
