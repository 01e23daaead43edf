"""`lora-serve demo`: the main job from nothing: real requests through Ray Serve to real files."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from rich.console import Console

from cluster.jobs.model import JobState
from deployments.catalog import CATALOG
from serve_app.cli.demo_requests import Request, drawing_requests, own_request
from serve_app.cli.demo_sheet import show
from serve_app.cli.terminal import Board
from serve_app.client import LoraServe

console = Console()


def run_demo(
    folder: Path,
    *,
    model: str | None,
    lora: Path | None,
    prompt: str | None,
    image: Path | None,
    keep: bool,
    port: int,
) -> int:
    """Serve, submit, save; return 0 when every request succeeded."""
    folder = folder.resolve()
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    if _taken(port):
        console.print(f"Port {port} is in use: choose another with [bold]--port[/].")
        return 2
    base_url = f"http://127.0.0.1:{port}"
    if model is not None and lora is not None and prompt is not None:
        requests = [own_request(folder, model, lora, prompt, image)]
        environment = {}
    else:
        console.print(
            "No model was named, so this demo uses [bold]a tiny FLUX that draws simple shapes[/]. "
            "Every part of the service is the real one. For your own LoRA on a GPU: "
            "[bold]lora-serve demo --model flux --lora FILE --prompt TEXT[/]"
        )
        requests = drawing_requests(folder)
        environment = {"CHECKPOINTS_PATH": f"{folder}/checkpoints", "HF_HUB_OFFLINE": "1", "DEVICE": "cpu"}
    environment |= {
        # The demo's own service is open; an empty variable counts as absent.
        "API_KEYS": "",
        "API_KEYS_FILE": "",
        "BASE_URL": base_url,
        "JOBS_URL": f"sqlite:///{folder}/jobs.db",
        "OUTPUT_BASE_PATH": f"file://{folder}/outputs",
        "WORKFLOWS_BASE_PATH": f"{folder}/loras",
    }
    os.environ.update(environment)
    try:
        _serve(sorted({request.body["model"] for request in requests}), port)
        failures = _render_all(base_url, requests, pictures)
        if not failures:
            show(console, requests, pictures)
        console.print(f"\nPictures and manifests: [bold]{pictures}[/]")
        if keep:
            _stay(base_url, requests[0])
    finally:
        _stop()
    return 1 if failures else 0


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _serve(models: list[str], port: int) -> None:
    """Start Ray on this machine and deploy the gateway and one application per model family."""
    # Ray's default depends on what ran before on this machine; this cluster lives and dies here.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray
    from ray import serve

    from serve_app import build_gateway, build_models
    from serve_app.settings import GatewayArgs, ModelsArgs

    with console.status("Starting Ray Serve"):
        cpus = max(os.cpu_count() or 1, 4)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.run(build_gateway(GatewayArgs()), name="gateway", route_prefix="/")
        for family in sorted({CATALOG[model].family for model in models}):
            members = tuple(model for model in models if CATALOG[model].family == family)
            serve.run(build_models(ModelsArgs(models=members)), name=family, route_prefix=None)


def _stop() -> None:
    """End this Ray cluster. A job that still runs is in the table and goes on with the next start."""
    import ray

    ray.shutdown()


def _render_all(base_url: str, requests: list[Request], pictures: Path) -> int:
    """Submit all requests at once, follow them to their ends, save what they made; return the failures."""

    def render(request: Request) -> bool:
        request_id = service.submit(request.body).request_id
        if service.wait(request_id, on_status=board.watch(request.name)).status is not JobState.SUCCEEDED:
            return False
        for index, (_, output) in enumerate(service.result(request_id).named()):
            stem = f"{request.name}-{index}"
            service.download(output, pictures / f"{stem}.{output.format}")
            manifest = httpx.get(str(output.manifest_url)).raise_for_status().json()
            (pictures / f"{stem}.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        return True

    with LoraServe(base_url) as service, Board() as board, ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(render, requests)).count(False)


def _stay(base_url: str, request: Request) -> None:
    body = json.dumps({key: value for key, value in request.body.items() if key != "output_format"})
    console.print(f"\nServing at [bold]{base_url}[/] (docs at {base_url}/docs). Try:\n")
    console.print(
        f"curl -s {base_url}/v1/inference -H 'Content-Type: application/json' -d '{body}'",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    console.print("\nCtrl-C ends it.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
