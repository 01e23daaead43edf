"""The numbers of every deployment, for the builders and for the rendered serve_config.yaml alike.

Serve replaces a deployment's whole `autoscaling_config` by the one in the file, so the file carries all of
it; numbers are edited there in place, without a restart. A changed policy restarts its application.
"""

from __future__ import annotations

from typing import Any

HTTP_OPTIONS: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 8000,
    # Above every honest request: the longest poll (60 s), and the largest body (64 MiB) at 2 Mbit/s.
    "request_timeout_s": 300.0,
    # Above what load balancers in front keep idle connections for (60 s): they must close them first.
    "keep_alive_timeout_s": 90,
}

GATEWAY_OPTIONS: dict[str, Any] = {
    # Long polls are ongoing requests, and cheap ones: 500 fit beside everything else. Beyond this bound
    # requests wait, at the proxy, for one that ends.
    "max_ongoing_requests": 1000,
    # Above the longest poll: a gateway that goes away answers all of its own.
    "graceful_shutdown_timeout_s": 75.0,
    "health_check_period_s": 2.0,
    "autoscaling_config": {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 200},
}


def worker_options(model: str, jobs: str) -> dict[str, Any]:
    """Return the deployment options of a model's workers; `jobs` is the table the policy reads."""
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
