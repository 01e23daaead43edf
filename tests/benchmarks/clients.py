"""500 clients of the Python client on one service: `python -m tests.benchmarks.clients`.

One process runs all clients. Each client submits its jobs one after another, with its own idempotency keys,
and long-polls each job to its end. The service is one gateway replica on SQLite behind HAProxy and one worker
with tiny FLUX checkpoints. When half of the jobs have ended, the process is killed with SIGKILL and another
takes over with only the log of the replies received so far. Meanwhile, plain sockets read statuses all the
time. The last line is one JSON object:

- `lost`: ids that a client received but the table does not have, and keys without a job that succeeded;
- `doubled`: jobs beyond one for each key;
- `status_p50_ms`, `status_p99_ms`: of those plain status reads;
- `submit_p99_ms`: of a client's submit, its retries included;
- `told_p99_ms`: from the end of a job to the return of its client's `wait`, without the jobs that were waited
  for when the clients were killed;
- `gateway_mb_early`, `gateway_mb_late`: resident memory of the gateway, medians of the second and the last
  fifth of the run.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from cluster.databases.database import open_database
from cluster.jobs.model import JobState
from cluster.jobs.schema import jobs
from deployments.engine.tiny import write_tiny_checkpoints, write_tiny_lora
from serve_app.client import AsyncLoraServe
from tests.benchmarks.jobs import body
from tests.benchmarks.load import drive, http
from tests.support.service import edited_config, free_port, replica_pids, serve_run

CLIENTS = 500
TOGETHER = 25
"""Clients per connection pool: httpx needs more time per request with a larger pool."""

JOBS_EACH = 2
POLLERS = 2
SLICE_S = 1.0
"""Seconds of status reads between two checks of the log and the memory."""

STALL_S = 300.0
"""The benchmark gives up after this many seconds without a job that ends."""


@dataclass(frozen=True)
class Submit:
    """The id that a client got, the seconds that took, and its arrival in seconds since the epoch."""

    job_id: str
    took_s: float
    at: float


@dataclass
class Log:
    """The replies that the clients received, one per line, written at once so that a kill loses none."""

    file: Path
    submitted: dict[str, Submit] = field(default_factory=dict)
    """By key: the first submit that was answered."""

    ended: dict[str, float] = field(default_factory=dict)
    """By id: when the client's `wait` returned, in seconds since the epoch."""

    def write(self, *words: object) -> None:
        with self.file.open("a") as file:
            file.write(" ".join(map(str, words)) + "\n")

    def read(self) -> Log:
        """Return the replies so far, without the line that a killed process was writing."""
        found = Log(self.file)
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        for line in lines:
            kind, *words = line.split()
            if kind == "submitted" and line.endswith("\n"):
                found.submitted.setdefault(words[0], Submit(words[1], float(words[2]), float(words[3])))
            elif kind == "ended" and line.endswith("\n"):
                found.ended[words[0]] = float(words[1])
        return found


def work(url: str, file: Path) -> None:
    """Run all clients, starting where the log ends."""
    asyncio.run(_all_clients(url, Log(file).read()))


async def _all_clients(url: str, before: Log) -> None:
    await asyncio.gather(*(_clients(url, before, first) for first in range(0, CLIENTS, TOGETHER)))


async def _clients(url: str, before: Log, first: int) -> None:
    # Each waiting call has its own connection, so these calls are as many clients.
    async with AsyncLoraServe(url) as service:

        async def client(number: int) -> None:
            for index in range(JOBS_EACH):
                key = f"client-{number}-{index}"
                if key in before.submitted and before.submitted[key].job_id in before.ended:
                    continue
                begun = time.perf_counter()
                submitted = await service.submit(body("a.safetensors", number), idempotency_key=key)
                took_s = time.perf_counter() - begun
                before.write("submitted", key, submitted.request_id, took_s, time.time())
                status = await service.wait(submitted.request_id)
                assert status.status is JobState.SUCCEEDED, status
                before.write("ended", submitted.request_id, time.time())

        await asyncio.gather(*map(client, range(first, first + TOGETHER)))


@dataclass
class Bench:
    """One run on the service at `port`, and the measurements taken next to the clients."""

    port: int
    file: Path
    status_s: list[float] = field(default_factory=list)
    gateway_mb: list[float] = field(default_factory=list)
    killed_at: float = 0.0

    def run(self) -> float:
        """Run the clients, kill them once in between; return the seconds of the run."""
        (gateway,) = map(psutil.Process, replica_pids("gateway"))
        begun, process = time.time(), self._clients()
        moved, known = begun, 0
        while process.is_alive():
            log = Log(self.file).read()
            self._read_statuses([submit.job_id for submit in log.submitted.values()])
            self.gateway_mb.append(gateway.memory_info().rss / 2**20)
            if not self.killed_at and len(log.ended) >= CLIENTS * JOBS_EACH / 2:
                process.kill()
                process.join()
                self.killed_at = time.time()
                process = self._clients()
            if len(log.ended) > known:
                moved, known = time.time(), len(log.ended)
            assert time.time() < moved + STALL_S, f"only {known} jobs ended"
        assert process.exitcode == 0, "the clients failed"
        return time.time() - begun

    def _clients(self) -> SpawnProcess:
        process = get_context("spawn").Process(target=work, args=(f"http://127.0.0.1:{self.port}", self.file))
        process.start()
        return process

    def _read_statuses(self, ids: Sequence[str]) -> None:
        if not ids:
            time.sleep(SLICE_S)
            return
        requests = [http("GET", f"/v1/requests/{job_id}/status") for job_id in ids[-100:]]
        answers = drive(self.port, requests, POLLERS, SLICE_S)
        assert set(answers.statuses) == {200}, answers.statuses
        self.status_s += answers.seconds

    def figures(self, url: str, took_s: float) -> dict[str, float]:
        """Compare the clients' replies with the table; return the figures of the last line."""
        log = Log(self.file).read()
        database = open_database(url)
        with database.read() as connection:
            columns = (jobs.c.id, jobs.c.idempotency_key, jobs.c.state, jobs.c.finished_at)
            rows = connection.execute(select(*columns)).all()
        database.close()
        keys = {f"client-{number}-{index}" for number in range(CLIENTS) for index in range(JOBS_EACH)}
        good = {row.idempotency_key for row in rows if row.state == JobState.SUCCEEDED}
        ended_at = {row.id: row.finished_at for row in rows}
        submits = log.submitted.values()
        missing = {submit.job_id for submit in submits} - set(ended_at)
        # The kill interrupted these waits, so their delays do not count.
        watched = [
            submit.job_id
            for submit in submits
            if submit.at > self.killed_at or log.ended[submit.job_id] < self.killed_at
        ]
        late_s = [log.ended[job_id] - ended_at[job_id] for job_id in watched if job_id in ended_at]
        fifth = max(len(self.gateway_mb) // 5, 1)
        return {
            "clients": CLIENTS,
            "jobs": len(rows),
            "lost": len(missing) + len(keys - good),
            "doubled": len(rows) - len(keys),
            "jobs_per_s": len(rows) / took_s,
            "status_reads": len(self.status_s),
            "status_p50_ms": _percentile_ms(self.status_s, 50),
            "status_p99_ms": _percentile_ms(self.status_s, 99),
            "submit_p99_ms": _percentile_ms([submit.took_s for submit in submits], 99),
            "told_p99_ms": _percentile_ms(late_s, 99),
            "gateway_mb_early": statistics.median(self.gateway_mb[fifth : 2 * fifth]),
            "gateway_mb_late": statistics.median(self.gateway_mb[-fifth:]),
        }


def _percentile_ms(seconds: Sequence[float], percent: int) -> float:
    return 1000 * sorted(seconds)[len(seconds) * percent // 100]


def main() -> None:
    """Start the service, run the clients, draw the table, print the JSON line."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, port = Path(scratch), free_port()
        write_tiny_checkpoints(folder / "checkpoints")
        write_tiny_lora(folder / "loras" / "a.safetensors", seed=0)
        environment = {
            "CHECKPOINTS_PATH": f"{folder}/checkpoints",
            "WORKFLOWS_BASE_PATH": f"{folder}/loras",
            "OUTPUT_BASE_PATH": f"{folder}/outputs",
            "JOBS_URL": f"sqlite:///{folder}/jobs.db",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            # By default Ray's workers run at a lower priority, so the clients here would slow them.
            "RAY_worker_niceness": "0",
        }
        config = yaml.safe_load(edited_config(["flux"], port, max_replicas=1))
        gateway = config["applications"][0]["deployments"][0]
        gateway["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}
        with serve_run(yaml.safe_dump(config, sort_keys=False), port, folder, environment):
            bench = Bench(port, folder / "clients.log")
            figures = bench.figures(environment["JOBS_URL"], bench.run())
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
