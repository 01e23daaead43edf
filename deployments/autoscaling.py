"""How many replicas a model gets: read from the job table, so that a running job counts like a waiting one.

Serve pickles this module by value into its controller and makes the policy anew on every deploy. It keeps no
state and no lock, and its arguments hold no secret: they are logged. The thread that reads the table belongs
to `cluster.load`, which the controller imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

YIELD_AFTER_S = 10.0
"""Queue age at which another model's job without any replica takes idle replicas' place. A replica that only
has to start announces itself sooner."""


class QueuePolicy:
    """Autoscaling of one model id: a replica per waiting or running job, within the deployment's bounds."""

    def __init__(self, model: str, jobs: str) -> None:
        """Read the table named by the environment's `JOBS_URL`, else `jobs`, a URL without a password."""
        from cluster.database import jobs_url
        from cluster.load import load_reader

        self._model = model
        self._reader = load_reader(jobs_url(jobs))

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the desired number of replicas, unbounded; while the table is away, the present target."""
        depths = self._reader.latest()
        if depths is None:
            return ctx.target_num_replicas, {}
        mine = depths.get(self._model)
        desired = mine.queued + mine.running if mine else 0
        starved = any(
            depth.queued and not depth.workers and depth.oldest_s > YIELD_AFTER_S
            for model, depth in depths.items()
            if model != self._model
        )
        if starved and ctx.config is not None:
            # Grow no further, and give up what is idle now, in this tick's own copy of the numbers: Serve
            # applies the delays of `ctx.config` after this call.
            desired = min(desired, max(ctx.current_num_replicas, 1))
            at_once = {"downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}
            ctx.config = ctx.config.model_copy(update=at_once)
        return desired, {}
