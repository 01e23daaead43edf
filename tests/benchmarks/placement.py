"""Placement of LoRAs on replicas: `python -m tests.benchmarks.placement`.

20 LoRAs of Zipf popularity, 4 replicas that hold 5 each, Poisson arrivals, on the real engine with a tiny
FLUX that is slowed to real times (`tests.benchmarks.slowed`). One run sends the same requests three times: to
our claims; to the same queue in plain order; to Ray Serve's `@serve.multiplexed`. There is no host tier, so
every miss is a load. A run takes about seven minutes. The last line is one JSON object; a hit is a job that
needs no load:

- `zipf_hit`, `zipf_hit_plain`, `zipf_hit_multiplexed`; `zipf_p95_s` and so on, from submission to the end;
- `zipf_p95_over_multiplexed`, `zipf_p95_over_plain`.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from cluster.jobs.model import JobState
from cluster.jobs.queue import JobQueue
from deployments.engine.tiny import write_tiny_checkpoints, write_tiny_lora
from deployments.spec.job import PromptSpec
from tests.benchmarks.multiplexed import Callers, multiplexed
from tests.benchmarks.replicas import job_with, workers
from tests.benchmarks.slowed import LOAD_S, slow_engine

Outcome: TypeAlias = tuple[bool, float]
"""True if a job needed no load of its LoRA, and the seconds from submission to the end."""

LORAS = 20
REPLICAS = 4
RATE = 2.0
"""Jobs per second: 0.4 of the capacity without loads, 1.2 of the capacity with one load per job."""

WARM_UP = 60
"""The first jobs are not counted: every LoRA must be loaded once."""

COUNTED = 160

PROMPT = PromptSpec(prompt="a road", neg="", width=64, height=64, steps=1, guidance=4.0, seed=1)


def traffic() -> list[tuple[float, str]]:
    """Return the requests: seconds since the start, and the LoRA."""
    chance, names = random.Random(7), [f"{n}.safetensors" for n in range(LORAS)]
    at, requests = 0.0, []
    for _ in range(WARM_UP + COUNTED):
        at += chance.expovariate(RATE)
        (name,) = chance.choices(names, [1 / (n + 1) for n in range(LORAS)])
        requests.append((at, name))
    return requests


def send(submit: Callable[[str], object]) -> None:
    """Submit all requests, each at its time."""
    begun = time.monotonic()
    for at, name in traffic():
        time.sleep(max(begun + at - time.monotonic(), 0))
        submit(name)


def through_claims(folder: Path, *, age_bound_s: float) -> Sequence[Outcome]:
    """Send the requests to our queue."""
    url = f"sqlite:///{folder}/jobs-{age_bound_s:g}.db"
    queue, ids = JobQueue(url), list[str]()

    def submit(lora: str) -> None:
        ids.extend(job.id for job in queue.submit([job_with(lora, PROMPT)]))

    with workers(REPLICAS, slow_engine, folder, url, age_bound_s):
        send(submit)
        while len(queue.finished(ids)) < len(ids):
            time.sleep(0.2)
    outcomes = []
    for job_id in ids:
        job = queue.get(job_id)
        assert job is not None and job.state is JobState.SUCCEEDED and job.finished_at and job.result, job
        timings = job.result["timings"]
        load_s = timings.get("prefetch", 0.0) + timings["adapters"]
        outcomes.append((load_s < LOAD_S, job.finished_at - job.created_at))
    queue.close()
    return outcomes


def through_multiplexed(folder: Path) -> Sequence[Outcome]:
    """Send the requests to Ray Serve."""
    with multiplexed(folder, REPLICAS) as handle:
        callers = Callers(handle, PROMPT)
        send(callers.submit)
        return callers.outcomes()


def figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the hit rate and statistics of the seconds from submission to the end."""
    counted = outcomes[WARM_UP:]
    seconds = sorted(took_s for _, took_s in counted)
    return {
        "hit": sum(hit for hit, _ in counted) / COUNTED,
        "p50_s": statistics.median(seconds),
        "p95_s": seconds[int(0.95 * COUNTED)],
        "max_s": seconds[-1],
    }


def main() -> None:
    """Run the three arms, draw the table, print the JSON line."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tiny_checkpoints(folder / "checkpoints")
        for n in range(LORAS):
            write_tiny_lora(folder / "loras" / f"{n}.safetensors", seed=n)
        arms = {
            "claims": figures(through_claims(folder, age_bound_s=60)),
            # With an age bound of 0 every job is over age, so the oldest goes first.
            "plain": figures(through_claims(folder, age_bound_s=0)),
            "multiplexed": figures(through_multiplexed(folder)),
        }
    table = Table("figure", *arms)
    for name in arms["claims"]:
        table.add_row(name, *(f"{values[name]:.2f}" for values in arms.values()))
    Console().print(table)
    ours, plain, theirs = arms.values()
    results = {
        "zipf_hit": ours["hit"],
        "zipf_hit_plain": plain["hit"],
        "zipf_hit_multiplexed": theirs["hit"],
        "zipf_p95_s": ours["p95_s"],
        "zipf_p95_plain_s": plain["p95_s"],
        "zipf_p95_multiplexed_s": theirs["p95_s"],
        "zipf_p95_over_plain": ours["p95_s"] / plain["p95_s"],
        "zipf_p95_over_multiplexed": ours["p95_s"] / theirs["p95_s"],
    }
    print(json.dumps({name: round(value, 3) for name, value in results.items()}))


if __name__ == "__main__":
    main()
