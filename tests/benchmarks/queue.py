"""Throughput of the job table on both databases: `python -m tests.benchmarks.queue`.

20,000 jobs with 200 LoRAs wait. 8 processes claim without a pause for some seconds; each holds the LoRAs of
its last three jobs. Then 1, 16 and 64 threads of one process submit one job at a time. Every commit is
flushed to the disk. The last line is one JSON object; for each database:

- `claims_per_s`, `claim_p50_ms`, `claim_p99_ms`; a job claimed twice ends the benchmark with an error;
- `submits_per_s_1`, `submits_per_s_16`, `submits_per_s_64`.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from rich.console import Console
from rich.table import Table

from cluster.jobs.queue import JobQueue
from tests.cluster.databases.postgres import PostgresServer
from tests.cluster.jobs.tables import MODEL, new_job

JOBS = 20_000
LORAS = 200
CLAIMERS = 8
CLAIM_S = 6.0
THREADS = (1, 16, 64)
SUBMIT_S = 3.0

SPAWN = multiprocessing.get_context("spawn")

Claimed = list[tuple[str, float]]
"""The ids of the jobs that one process claimed, each with the seconds of its claim."""


def claim_for_a_while(url: str, owner: str, start: Barrier, claimed: Queue[Claimed]) -> None:
    queue, mine, warm = JobQueue(url), [], []
    start.wait()
    end = time.monotonic() + CLAIM_S
    while (begun := time.monotonic()) < end:
        held = queue.claim(MODEL, owner, warm=warm)
        assert held is not None, "the queue ran empty: claim for a shorter time"
        mine.append((held.job.id, time.monotonic() - begun))
        warm = [*(name for name in warm if name != held.job.adapter), held.job.adapter][-3:]
    claimed.put(mine)


def measure_claims(url: str) -> dict[str, float]:
    queue = JobQueue(url)
    for first in range(0, JOBS, 500):
        queue.submit([new_job(f"lora-{n % LORAS}") for n in range(first, first + 500)])
    start, claimed = SPAWN.Barrier(CLAIMERS), SPAWN.Queue()
    processes = [
        SPAWN.Process(target=claim_for_a_while, args=(url, f"replica-{n}", start, claimed))
        for n in range(CLAIMERS)
    ]
    for process in processes:
        process.start()
    claims = [claim for _ in processes for claim in claimed.get(timeout=120)]
    for process in processes:
        process.join()
    queue.close()
    assert len({job_id for job_id, _ in claims}) == len(claims), "a job was claimed twice"
    seconds = sorted(seconds for _, seconds in claims)
    return {
        "claims_per_s": len(claims) / CLAIM_S,
        "claim_p50_ms": 1000 * statistics.median(seconds),
        "claim_p99_ms": 1000 * seconds[int(0.99 * len(seconds))],
    }


def measure_submits(url: str, threads: int) -> float:
    """Return how many jobs per second this many threads store."""
    queue, counts = JobQueue(url), []
    end = time.monotonic() + SUBMIT_S

    def submit() -> None:
        count = 0
        while time.monotonic() < end:
            queue.submit([new_job()])
            count += 1
        counts.append(count)

    clients = [threading.Thread(target=submit) for _ in range(threads)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    queue.close()
    assert len(counts) == threads
    return sum(counts) / SUBMIT_S


def main() -> None:
    """Measure both databases in turns, draw the table, print the JSON line."""
    server = PostgresServer(flush=True)
    figures: dict[str, dict[str, float]] = {"sqlite": {}, "postgresql": {}}
    with tempfile.TemporaryDirectory() as scratch:
        urls = {"sqlite": f"sqlite:///{scratch}/jobs.db", "postgresql": server.create()}
        for database, url in urls.items():
            figures[database] |= measure_claims(url)
        for threads in THREADS:
            for database, url in urls.items():
                figures[database][f"submits_per_s_{threads}"] = measure_submits(url, threads)
    server.close()
    table = Table("figure", *figures)
    for name in figures["sqlite"]:
        table.add_row(name, *(f"{values[name]:.1f}" for values in figures.values()))
    Console().print(table)
    rounded = {kind: {key: round(value, 1) for key, value in of.items()} for kind, of in figures.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
