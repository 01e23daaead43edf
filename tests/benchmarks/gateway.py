"""Throughput of the gateway over real HTTP: `python -m tests.benchmarks.gateway`.

Three services run one after another: the default proxy; HAProxy; HAProxy with throughput-optimized replicas
and no access log. Each has one gateway replica on SQLite, one on PostgreSQL (both flush every commit to the
disk) and one without the insert. No worker runs. 1, 16 and 64 clients, in a separate process, submit jobs and
read statuses. Cells that are compared take turns in several short rounds, so that a busy machine slows both.
After each cell the benchmark looks up every id that was answered with 200 in its table.

The last line is one JSON object; a ratio is the median over the rounds, of the worse database:

- `haproxy_over_default`: POST/s of 64 clients, HAProxy over the default proxy;
- `post_over_nostore_64`: POST/s of 64 clients over the same without the insert, optimized;
- `post_64_over_16`: POST/s of 64 clients over that of 16, optimized;
- `lost`: ids that were answered with 200 and are in no table; `errors_5xx`: answers of 500 and above;
- `reconnects`: connections that closed while a request was sent, as when a proxy reloads.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from operator import truediv
from pathlib import Path

import httpx
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file
from sqlalchemy import select

from cluster.databases.database import open_database
from cluster.jobs.queue import JobQueue
from cluster.jobs.schema import jobs
from serve_app.config_file import render_config
from tests.benchmarks.load import Answers, drive, http
from tests.cluster.databases.postgres import PostgresServer
from tests.cluster.jobs.tables import empty, new_job
from tests.support.service import free_port, serve_run, wait_until

CLIENTS = (1, 16, 64)
ROUNDS = 3
POST_S = 1.5
STATUS_S = 1.0
WARM_S = 1.0
QUEUED = 500
"""Number of waiting jobs while statuses are read."""

MODES = ("default", "haproxy", "optimized")
DATABASES = ("sqlite", "postgresql")
NO_STORE = "nostore"
"""The gateway without the insert."""

PREFIXES = {"sqlite": "/sqlite", "postgresql": "/postgresql", NO_STORE: ""}

ROOT = Path(__file__).parents[2]

BODY = {
    "model": "flux",
    "loras": [{"path": "style.safetensors", "network_multiplier": 0.8}],
    "prompts": [{"prompt": "[trigger], a red fox in the snow", "width": 1024, "height": 768, "seed": 42}],
    "trigger_word": "p5x",
}


@dataclass
class Cell:
    """One route of one gateway with some clients: the rate of each round, the seconds of all requests."""

    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def percentile_ms(self, percent: int) -> float:
        return 1000 * sorted(self.seconds)[len(self.seconds) * percent // 100]

    def over(self, other: Cell) -> float:
        """Return how many times as fast this cell is as `other`, compared round by round."""
        return statistics.median(map(truediv, self.rates, other.rates))


class Bench:
    """The cells by mode, gateway, route and clients; the error counts; the job tables."""

    def __init__(self, urls: Mapping[str, str], generator: ProcessPoolExecutor) -> None:
        self.cells: dict[tuple[str, str, str, int], Cell] = defaultdict(Cell)
        self.lost = 0
        self.errors_5xx = 0
        self.reconnects = 0
        self.urls = urls
        self._generator = generator

    def measure(self, mode: str, port: int) -> None:
        """Run all cells of the service on `port`."""
        body = json.dumps(BODY).encode()
        post = {name: [http("POST", f"{prefix}/v1/inference", body)] for name, prefix in PREFIXES.items()}
        for name, requests in post.items():
            self._drive(name, port, requests, 16, WARM_S)
        for _ in range(ROUNDS):
            for clients in CLIENTS:
                for name, requests in post.items():
                    answers = self._drive(name, port, requests, clients, POST_S)
                    self._note((mode, name, "POST", clients), answers)
        for name in DATABASES:
            queue = JobQueue(self.urls[name])
            queued = queue.submit([new_job() for _ in range(QUEUED)])
            status = [http("GET", f"/{name}/v1/requests/{job.id}/status") for job in queued]
            for _ in range(ROUNDS):
                for clients in CLIENTS:
                    answers = self._generator.submit(drive, port, status, clients, STATUS_S).result()
                    self._note((mode, name, "status", clients), answers)
            queue.close()
            empty(self.urls[name])

    def _drive(
        self, name: str, port: int, requests: Sequence[bytes], clients: int, duration_s: float
    ) -> Answers:
        """Submit jobs, look each of them up, and empty the table for the next cell."""
        answers = self._generator.submit(drive, port, requests, clients, duration_s).result()
        if name != NO_STORE:
            database = open_database(self.urls[name])
            with database.read() as connection:
                self.lost += len(set(answers.ids).difference(connection.scalars(select(jobs.c.id))))
            database.close()
            empty(self.urls[name])
        return answers

    def _note(self, cell: tuple[str, str, str, int], answers: Answers) -> None:
        errors = sum(count for status, count in answers.statuses.items() if status >= 500)
        self.errors_5xx += errors
        self.reconnects += answers.reconnects
        good = answers.statuses.get(200, 0)
        assert good + errors == len(answers.seconds), f"{cell}: {answers.statuses}"
        self.cells[cell].rates.append(good / answers.took_s)
        self.cells[cell].seconds += answers.seconds

    def over(self, cell: tuple[str, str, int], other: tuple[str, str, int]) -> float:
        """Return the ratio of two POST cells, each (mode, gateway, clients), for the worse database.

        An empty gateway name stands for each database in turn.
        """
        ratios = []
        for database in DATABASES:
            mine, theirs = (
                self.cells[mode, name or database, "POST", clients] for mode, name, clients in (cell, other)
            )
            ratios.append(mine.over(theirs))
        return min(ratios)

    def figures(self) -> dict[str, float]:
        """Return the figures of the last line."""
        optimized = ("optimized", "", 64)
        return {
            "haproxy_over_default": self.over(("haproxy", "", 64), ("default", "", 64)),
            "post_over_nostore_64": self.over(optimized, ("optimized", NO_STORE, 64)),
            "post_64_over_16": self.over(optimized, ("optimized", "", 16)),
            "lost": self.lost,
            "errors_5xx": self.errors_5xx,
            "reconnects": self.reconnects,
        }

    def table(self) -> Table:
        """Return all cells as a table to print."""
        table = Table("proxy", "gateway", "route", "clients", "per s", "p50 ms", "p99 ms")
        for (mode, name, route, clients), cell in self.cells.items():
            rate, p50, p99 = statistics.median(cell.rates), cell.percentile_ms(50), cell.percentile_ms(99)
            table.add_row(mode, name, route, str(clients), f"{rate:.0f}", f"{p50:.1f}", f"{p99:.1f}")
        return table


def config_of(mode: str, port: int, urls: Mapping[str, str]) -> str:
    """Return the rendered config with the three gateways in place of everything else, one replica each."""
    config = yaml.safe_load(render_config([]))
    gateway = config["applications"][0]
    gateway["deployments"][0]["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 1}
    config["http_options"]["port"] = port
    config["applications"] = [
        gateway
        | {"name": name, "route_prefix": prefix or "/", "args": {"jobs": urls[name], "max_queued": 10**9}}
        for name, prefix in PREFIXES.items()
    ]
    config["applications"][-1]["import_path"] = "tests.benchmarks.unstored:build_unstored"
    if mode == "optimized":
        config["logging_config"] = {"enable_access_log": False}
    return yaml.safe_dump(config, sort_keys=False)


def environment_of(mode: str, folder: Path) -> dict[str, str]:
    """Return the environment of the service's processes."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "WORKFLOWS_BASE_PATH": f"{folder}/loras",
        "OUTPUT_BASE_PATH": f"{folder}/outputs",
    }
    if mode != "default":
        environment["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    if mode == "optimized":
        environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
    return environment


def write_lora(file: Path) -> None:
    """Write a LoRA of 500 modules: the header is as long as a real one, the weights are smaller."""
    file.parent.mkdir()
    names = [f"transformer.blocks.{n}.attn.to_q.lora_{side}.weight" for n in range(500) for side in "AB"]
    save_file({name: np.ones((1, 1), np.float16) for name in names}, file)


def is_there(client: httpx.Client, prefix: str) -> bool:
    return client.get(f"{prefix}/ready").status_code == 200


def main() -> None:
    """Run the three services, draw the table, print the JSON line."""
    server = PostgresServer(flush=True)
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(1, get_context("spawn")) as generator:
        folder = Path(scratch)
        write_lora(folder / "loras" / "style.safetensors")
        urls = {name: f"sqlite:///{folder}/{name}.db" for name in ("sqlite", NO_STORE)}
        bench = Bench(urls | {"postgresql": server.create()}, generator)
        for mode in MODES:
            port = free_port()
            config = config_of(mode, port, bench.urls)
            with serve_run(config, port, folder, environment_of(mode, folder)) as client:
                for prefix in PREFIXES.values():
                    wait_until(partial(is_there, client, prefix), 60, f"the start of {prefix}")
                bench.measure(mode, port)
    server.close()
    Console().print(bench.table())
    print(json.dumps({name: round(value, 3) for name, value in bench.figures().items()}))


if __name__ == "__main__":
    main()
