"""The options of every deployment, used by the builders and by the rendered serve_config.yaml.

Serve replaces a deployment's whole `autoscaling_config` with the one in the file, so the file contains all of
it. Numbers can be edited there without a restart. A changed policy restarts its application.
"""

from __future__ import annotations

from typing import Any

HTTP_OPTIONS: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 8000,
    # Longer than any ordinary request: the longest poll (60 s), or the largest body (64 MiB) at 2 Mbit/s.
    "request_timeout_s": 300.0,
    # Longer than load balancers keep idle connections (60 s): they must close first.
    "keep_alive_timeout_s": 90,
}

GATEWAY_OPTIONS: dict[str, Any] = {
    # Long polls count as ongoing requests but are cheap: 500 fit besides all other requests. Above this
    # limit, requests wait at the proxy until another ends.
    "max_ongoing_requests": 1000,
    # Longer than the longest poll: a gateway that shuts down answers all its requests.
    "graceful_shutdown_timeout_s": 75.0,
    "health_check_period_s": 2.0,
    "autoscaling_config": {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 200},
}


def worker_options(model: str, jobs: str) -> dict[str, Any]:
    """Return the deployment options of a model's workers. The policy reads the job table at `jobs`."""
    return {
        "graceful_shutdown_timeout_s": 900.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
        "autoscaling_config": {
            "min_replicas": 0,
            "max_replicas": 4,
            "upscale_delay_s": 5.0,
            "downscale_delay_s": 120.0,
            "downscale_to_zero_delay_s": 300.0,
            "policy": {
                "policy_function": "deployments.autoscaling:QueuePolicy",
                "policy_kwargs": {"model": model, "jobs": jobs},
            },
        },
    }
