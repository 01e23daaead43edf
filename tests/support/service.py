"""A real service for tests: `serve run` with a rendered config, in its own process and on its own port."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve_app.config_file import render_config


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of all processes below `pid`, by pid."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # It ended while we looked.
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return {child: titles[child] for child in found - {pid}}


def replica_pids(deployment: str, root: int | None = None) -> list[int]:
    """Return the pids of a deployment's replicas among the descendants of `root` (this process)."""
    tree = descendants(root or os.getpid())
    replica = re.compile(rf"ray::ServeReplica:.*:{deployment}([. ]|$)")
    return [pid for pid, title in tree.items() if replica.match(title)]


def wait_until(probe: Any, timeout_s: float, what: str) -> Any:
    """Poll `probe` until it returns a true value; return that value."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        value = probe()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


def edited_config(
    models: Sequence[str],
    port: int,
    *,
    args: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    policy: Mapping[str, Any] | None = None,
    **scaling: Any,
) -> str:
    """Return the rendered config with another port and edited workers; `policy` holds policy arguments."""
    config = yaml.safe_load(render_config(models))
    config["http_options"]["port"] = port
    for application in config["applications"][1:]:
        application["args"].update(args or {})
        for deployment in application["deployments"]:
            deployment.update(options or {})
            deployment["autoscaling_config"].update(scaling)
            deployment["autoscaling_config"]["policy"]["policy_kwargs"].update(policy or {})
    return yaml.safe_dump(config, sort_keys=False)


def redeploy(config: str, folder: Path) -> None:
    """Apply a new config to the service that runs in `folder`, as `serve deploy` does."""
    dashboard = re.search(r"dashboard at .*?http://([\d.]+:\d+)", (folder / "serve.log").read_text())
    assert dashboard, "the log names no dashboard"
    url = f"http://{dashboard[1]}/api/serve/applications/"
    httpx.put(url, json=yaml.safe_load(config), timeout=60).raise_for_status()


@contextmanager
def serve_run(config: str, port: int, folder: Path, environment: Mapping[str, str]) -> Iterator[httpx.Client]:
    """Run the service until the block ends; yield a client for it. Its output goes to `folder/serve.log`.

    It starts its own cluster, unless `environment` sets `RAY_ADDRESS`.
    """
    # Ray's socket paths have a maximum length, so its folder needs a short path.
    ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    file = folder / "serve_config.yaml"
    file.write_text(config)
    base_url = f"http://127.0.0.1:{port}"
    replica_port = free_port()
    env = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "RAY_TMPDIR": ray_folder,
        "RAY_AUTH_MODE": "disabled",
        # Used with RAY_SERVE_ENABLE_HA_PROXY=1. Its socket path has a maximum length too.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{ray_folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{ray_folder}/haproxy.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": ray_folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{ray_folder}/haproxy.state",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        # Ports of the replicas. On the default ports, another service here would take its requests.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_port + 100),
        # A machine with several clusters needs more than 5 s; Serve would give its proxy up.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "BASE_URL": base_url,
        "DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    serve = Path(sys.executable).with_name("serve")
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen([serve, "run", str(file)], cwd=folder, env=env, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=base_url, timeout=90) as client:
                wait_until(lambda: _healthy(client, process, folder), 180, "the service's start")
                yield client
        finally:
            _end(process)
            shutil.rmtree(ray_folder, ignore_errors=True)


def _healthy(client: httpx.Client, process: subprocess.Popen[bytes], folder: Path) -> bool:
    assert process.poll() is None, (folder / "serve.log").read_text()[-4000:]
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop the service as Ctrl-C does, then kill by pid what it left behind."""
    tree = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
    time.sleep(1)
    for pid in tree:
        try:
            if b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


def finished(client: httpx.Client, job_id: str, timeout_s: float = 180) -> dict[str, Any]:
    """Long-poll a job to its end; return its status."""

    def probe() -> dict[str, Any] | None:
        status = client.get(f"/v1/requests/{job_id}/status", params={"wait": 30}).json()
        return status if status["status"] in ("succeeded", "failed", "canceled") else None

    return wait_until(probe, timeout_s, f"the end of job {job_id}")


def submit(client: httpx.Client, body: Mapping[str, Any], **headers: str) -> str:
    """Submit a request that must be accepted; return its id."""
    answer = client.post("/v1/inference", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["request_id"]
