"""The number of replicas of each model, from the job table: running jobs count like waiting ones.

Serve pickles this module by value into its controller and creates the policy again on every deploy. So the
policy holds no lock, and its state is kept by Serve. Serve logs its arguments, so they must hold no secret.
The thread that reads the table belongs to `cluster.jobs.depth_reader`, which the controller imports.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray.serve.config import AutoscalingContext

    from cluster.jobs.model import Depth

YIELD_AFTER_S = 10.0
"""Queue age at which idle replicas make room for another model that has jobs but no replica. A replica that
is merely starting announces itself sooner than that."""

YIELD_BUSY_AFTER_S = 60.0
"""Queue age at which a busy replica also makes room for such a model. The busy model must have served for at
least this long as well. So steady traffic for one model cannot block another forever; each gets a turn."""

START_AGAIN_S = 120.0
"""How long a model waits for a replica to announce itself before it asks again from zero. A replica does so
within seconds of its start. Serve gives up on a version whose first three replicas die while they start, and
tries again only after the target was zero."""


class QueuePolicy:
    """Autoscaling of one model id: one replica per waiting or running job, within the deployment's bounds."""

    def __init__(self, model: str, jobs: str, yield_busy_after_s: float = YIELD_BUSY_AFTER_S) -> None:
        """Read the table at the environment's `JOBS_URL`, else at `jobs`, a URL without a password.

        `yield_busy_after_s` replaces `YIELD_BUSY_AFTER_S`, in seconds.
        """
        from cluster.databases.database import jobs_url
        from cluster.jobs.depth_reader import load_reader

        self._model = model
        self._yield_busy_after_s = yield_busy_after_s
        self._reader = load_reader(jobs_url(jobs))

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the desired number of replicas, unbounded. If the table is unreachable, keep the target."""
        depths = self._reader.latest(self._model)
        if depths is None or ctx.config is None:
            return ctx.target_num_replicas, ctx.policy_state
        own_depth = depths.get(self._model)
        desired = own_depth.queued + own_depth.running if own_depth else 0
        phase = _phase(ctx.current_num_replicas, own_depth)
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
            # Give up one replica only, until the other model has started: a replica drains before it ends.
            most = ctx.current_num_replicas - 1
        if most is None:
            return min(desired, max(ctx.current_num_replicas, 1)), state
        return min(desired, most), state | {"most": most}


def _phase(replicas: int, own_depth: Depth | None) -> str:
    """Return a model's phase: serving, starting, absent (it has jobs but no replica yet) or idle."""
    if replicas:
        return "serving"
    if own_depth is not None and own_depth.workers:
        return "starting"
    return "absent" if own_depth is not None else "idle"


def _scale_down_at_once(ctx: AutoscalingContext) -> None:
    """Set the scale-down delays to 0 for this tick only: Serve applies them after the policy returns."""
    at_once = {"downscale_delay_s": 0.0, "downscale_to_zero_delay_s": 0.0}
    ctx.config = ctx.config.model_copy(update=at_once)  # type: ignore[union-attr]


def _best_served(depths: Mapping[str, Depth]) -> str | None:
    """Return the model with the most replicas. On a tie, take the one whose jobs wait the least."""
    served = {model: depth for model, depth in depths.items() if depth.workers}
    return max(
        served, key=lambda model: (served[model].workers, -served[model].oldest_s, model), default=None
    )
