"""Builds Serve applications from typed arguments. Only this module of the server needs Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import ray
from ray import serve
from ray.serve import Application

from cluster.databases import database
from cluster.objects import opening
from cluster.telemetry import configure_logging
from deployments.worker.replica import Worker
from serve_app.deployment_options import GATEWAY_OPTIONS, worker_options
from serve_app.settings import GatewayArgs, ModelsArgs, Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

SMALL_CPU = 0.1
"""CPUs of gateways and roots: small, so that they never take the place of a worker."""

WORKER_CPU = 0.5
"""CPUs of a worker without a GPU."""


def gateway(args: GatewayArgs) -> Application:
    """Build the gateway's application."""
    _refuse_several_nodes(args)

    def app() -> FastAPI:
        # Built on the replica, because a live application cannot be serialized.
        from serve_app.gateway.app import create_app

        configure_logging()
        return create_app(args)

    deployment: Any = serve.deployment(serve.ingress(app)(Gateway))
    options = {"ray_actor_options": {"num_cpus": SMALL_CPU}, **GATEWAY_OPTIONS}
    return deployment.options(name="gateway", **options).bind()


class Gateway:
    """The gateway, also callable by deployment handle: `serve_app.client.ray_client` uses the same routes.

    These calls need the same keys. Anyone who has a Ray client can run code on the cluster, so there the keys
    protect nothing; they only record who owns a job.
    """

    app: FastAPI

    async def base_url(self) -> str:
        """Return the base URL of the gateway's URLs."""
        return self.app.state.parts.settings.base_url

    async def exchange(
        self, method: str, target: str, headers: list[tuple[bytes, bytes]], content: bytes
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Answer an HTTP request for `target`, a path with its query. Returns status, headers and body."""
        request = httpx.Request(method, f"http://gateway{target}", headers=headers, content=content)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        response = await transport.handle_async_request(request)
        return response.status_code, response.headers.raw, await response.aread()


def models(args: ModelsArgs) -> Application:
    """Build the application of one family: its workers, and the ingress deployment (root) that binds them.

    A worker is never the root, because behind HAProxy a root drains late and opens an HTTP port.
    """
    _refuse_several_nodes(args)
    device = _device(args.device)
    settings = args.model_copy(update={"device": device})
    actor: dict[str, Any] = {"num_gpus": 1, "num_cpus": 1} if device == "cuda" else {"num_cpus": WORKER_CPU}
    worker: Any = serve.deployment(Worker)
    workers = [
        worker.options(name=model, ray_actor_options=actor, **worker_options(model, args.jobs)).bind(
            model, settings
        )
        for model in args.models
    ]
    return _Root.bind(*workers)


@serve.deployment(ray_actor_options={"num_cpus": SMALL_CPU})
class _Root:
    """Binds the workers of an application. It serves no requests."""

    def __init__(self, *workers: Any) -> None:  # noqa: ANN401 - handles, never called
        self._workers = workers


def _device(wanted: str) -> str:
    """Resolve `auto`: `cuda` if the cluster has a GPU now. If it adds GPUs on demand, set `cuda` yourself."""
    if wanted != "auto":
        return wanted
    return "cuda" if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) else "cpu"


def _refuse_several_nodes(settings: Settings) -> None:
    """Refuse local storage in a cluster of several nodes: each node would see only its own disk."""
    if not ray.is_initialized() or sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    if not database.is_shared(database.jobs_url(settings.jobs)):
        raise RuntimeError(
            "SQLite works on one node only; for several nodes, "
            "set JOBS_URL to postgresql://USER:PASSWORD@HOST/DATABASE"
        )
    if not opening.is_shared(settings.outputs):
        raise RuntimeError(
            "a local output directory works on one node only; for several nodes, "
            "set OUTPUT_BASE_PATH to s3://BUCKET/PREFIX"
        )
