"""A client without HTTP, for code in the cluster and for notebooks that are connected by Ray client.

`connect` returns an ordinary client that sends its requests through the gateway's deployment handle.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from serve_app.client import LoraServe, LoraServeError, Unreachable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_IGNORE = "RAY_IGNORE_VERSION_MISMATCH"

_RETRY_WAITS_S = 1.0, 3.0

T = TypeVar("T")


def connect(address: str | None = None, api_key: str | None = None, *, app: str = "gateway") -> LoraServe:
    """Return a client of the service in the cluster at `address`, such as `ray://head:10001`.

    Inside the cluster, or if Ray is already connected, no address is needed. Ray client needs the cluster's
    version of Ray and its minor version of Python. If they differ, this raises `LoraServeError` with code
    `VERSION_MISMATCH`; its message says what to install. Raises `Unreachable` if there is no cluster, or no
    gateway in it. Only `map` of this client uses HTTP.
    """
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    if not ray.is_initialized():
        _connect_ray(address)
    try:
        handle = serve.get_app_handle(app)
        base_url: str = _call_in_thread(lambda: handle.base_url.remote().result())
    except (RayServeException, RayError, ConnectionError) as error:
        raise Unreachable(
            "UNREACHABLE", f"The application {app!r} does not answer in this cluster: {error}"
        ) from error
    return LoraServe(base_url, api_key, mounts={_origin(base_url): _HandleTransport(handle, base_url)})


class _HandleTransport(httpx.BaseTransport):
    """Sends requests to the gateway through its deployment handle."""

    def __init__(self, handle: DeploymentHandle, base_url: str) -> None:
        self._handle = handle
        # A proxy in front of the gateway would remove this prefix.
        self._prefix = httpx.URL(base_url).path.rstrip("/")

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        target = request.url.raw_path.decode("ascii").removeprefix(self._prefix)
        call = request.method, target, request.headers.raw, request.read()
        timeout_s = request.extensions["timeout"]["read"]
        try:
            status, headers, content = _call_in_thread(
                lambda: self._handle.exchange.remote(*call).result(timeout_s=timeout_s)
            )
        except TimeoutError as error:
            raise httpx.ReadTimeout("the gateway did not answer in time", request=request) from error
        except (RayServeException, RayError, ConnectionError) as error:
            # The gateway's replica died, perhaps after it had acted on the request.
            raise httpx.ReadError(f"{type(error).__name__}: {error}", request=request) from error
        return httpx.Response(status, headers=headers, content=content)


def _call_in_thread(call: Callable[[], T]) -> T:
    """Call in another thread: a notebook runs an event loop in this one, where handles cannot block."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def _origin(base_url: str) -> str:
    url = httpx.URL(base_url)
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _connect_ray(address: str | None) -> None:
    import ray

    before = os.environ.get(_IGNORE)
    # We compare the versions ourselves, because our error says what to install.
    os.environ[_IGNORE] = "1"
    try:
        context: Any = _init_with_retries(address)
    except ConnectionError as error:
        message = f"No Ray cluster answers at {address}: {error}"
        raise Unreachable("UNREACHABLE", message) from error
    finally:
        if before is None:
            del os.environ[_IGNORE]
        else:
            os.environ[_IGNORE] = before
    if (address or "").startswith("ray://"):
        try:
            check_versions(context.ray_version, context.python_version)
        except LoraServeError:
            ray.shutdown()
            raise


def _init_with_retries(address: str | None) -> object:
    """Call `ray.init`, again if the head could not start the process that it starts for each Ray client.

    Ray does not try this again itself: when that process dies while it starts, `ray.init` raises
    `ConnectionAbortedError`.
    """
    import ray

    for wait_s in _RETRY_WAITS_S:
        try:
            return ray.init(address)
        except ConnectionAbortedError:
            time.sleep(wait_s)
    return ray.init(address)


def check_versions(ray_version: str, python_version: str) -> None:
    """Raise `LoraServeError` if this process cannot be a Ray client of a cluster with these versions."""
    import ray

    wanted, own = _minor(python_version), _minor(platform.python_version())
    if (ray_version, wanted) == (ray.__version__, own):
        return
    pip = f'`pip install "ray[client,serve]=={ray_version}"`'
    fix = f"Run {pip}" if wanted == own else f"Install Python {wanted} and run {pip} in it"
    raise LoraServeError(
        "VERSION_MISMATCH",
        f"The cluster has Python {python_version} and Ray {ray_version}, but this process has Python"
        f" {platform.python_version()} and Ray {ray.__version__}. {fix}, or use HTTP, which works with any"
        " version.",
        {"ray": ray_version, "python": python_version},
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
