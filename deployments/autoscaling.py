"""How many replicas a model gets: read from the job table, so that a running job counts like a waiting one.

Serve pickles this module by value into its controller and makes the policy anew on every deploy. It keeps no
lock, Serve keeps what it has to remember, and its arguments hold no secret: they are logged. The thread that
reads the table belongs to `cluster.jobs.depth_reader`, which the controller imports.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray.serve.config import AutoscalingContext

    from cluster.jobs.model import Depth

YIELD_AFTER_S = 10.0
"""Queue age at which another model's job without any replica takes idle replicas' place. A replica that only
has to start announces itself sooner."""

YIELD_BUSY_AFTER_S = 60.0
"""Queue age at which it also takes the place of one replica that has work, and how long that model has served
by then at least: steady traffic of one must not keep another waiting for ever, and each gets a turn."""

START_AGAIN_S = 120.0
"""How long a model waits for the first sign of a replica, which comes within seconds of its start, before it
asks anew. Serve gives up a version whose first three replicas die while they start, until it was at zero."""


class QueuePolicy:
    """Autoscaling of one model id: a replica per waiting or running job, within the deployment's bounds."""

    def __init__(self, model: str, jobs: str, yield_busy_after_s: float = YIELD_BUSY_AFTER_S) -> None:
        """Read the table named by the environment's `JOBS_URL`, else `jobs`, a URL without a password.

        `yield_busy_after_s` may be another bound in seconds than `YIELD_BUSY_AFTER_S`.
        """
        from cluster.databases.database import jobs_url
        from cluster.jobs.depth_reader import load_reader

        self._model = model
        self._yield_busy_after_s = yield_busy_after_s
        self._reader = load_reader(jobs_url(jobs))

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the desired number of replicas, unbounded; while the table is away, the present target."""
        depths = self._reader.latest(self._model)
        if depths is None or ctx.config is None:
            return ctx.target_num_replicas, ctx.policy_state
        mine = depths.get(self._model)
        desired = mine.queued + mine.running if mine else 0
        phase = _phase(ctx.current_num_replicas, mine)
        since = ctx.policy_state["since"] if ctx.policy_state.get("phase") == phase else time.time()
        state, lasted_s = {"phase": phase, "since": since}, time.time() - since
        if phase == "absent" and lasted_s > START_AGAIN_S:
            _scale_down_at_once(ctx)
            return 0, {}
        others = [depth for model, depth in depths.items() if model != self._model]
        starved_s = max(
            (depth.oldest_s for depth in others if depth.queued and not depth.workers), default=0.0
        )
        if starved_s <= YIELD_AFTER_S:
            return desired, state
        _scale_down_at_once(ctx)
        most = ctx.policy_state.get("most")
        had_its_turn = phase == "serving" and min(lasted_s, starved_s) > self._yield_busy_after_s
        if most is None and had_its_turn and self._model == _best_served(depths):
            # One is enough until the other model has started: a replica drains before it goes.
            most = ctx.current_num_replicas - 1
        if most is None:
            return min(desired, max(ctx.current_num_replicas, 1)), state
        return min(desired, most), state | {"most": most}


def _phase(replicas: int, mine: Depth | None) -> str:
    """Return what a model's replicas do: serve, start, or show no sign though there are jobs for them."""
    if replicas:
        return "serving"
    if mine is not None and mine.workers:
        return "starting"
    return "absent" if mine is not None else "idle"


def _scale_down_at_once(ctx: AutoscalingContext) -> None:
    """Change this tick's own copy of the numbers: Serve applies the delays of `ctx.config` afterwards."""
    at_once = {"downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}
    ctx.config = ctx.config.model_copy(update=at_once)  # type: ignore[union-attr]


def _best_served(depths: Mapping[str, Depth]) -> str | None:
    """Return the model with the most replicas; of several, one whose jobs wait the least."""
    served = {model: depth for model, depth in depths.items() if depth.workers}
    return max(
        served, key=lambda model: (served[model].workers, -served[model].oldest_s, model), default=None
    )
