"""The service without HTTP, for notebooks that reach a cluster by Ray client and for code that runs in it.

`connect` returns an ordinary client, whose requests go to the gateway by its deployment's handle.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from serve_app.client import LoraServe, LoraServeError, Unreachable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_IGNORE = "RAY_IGNORE_VERSION_MISMATCH"

T = TypeVar("T")


def connect(address: str | None = None, api_key: str | None = None, *, app: str = "gateway") -> LoraServe:
    """Return a client of the service in the cluster at `address`, such as `ray://head:10001`.

    Inside the cluster, and where Ray is connected already, no address is needed. Ray client needs the
    cluster's version of Ray and minor version of Python: others raise `LoraServeError` with the code
    `VERSION_MISMATCH` and a sentence that says what to install. Raises `Unreachable` where there is no
    cluster, or no gateway in it. Only `map` of this client goes by HTTP.
    """
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    if not ray.is_initialized():
        _connect_ray(address)
    try:
        handle = serve.get_app_handle(app)
        base_url: str = _outside_of_loops(lambda: handle.base_url.remote().result())
    except (RayServeException, RayError, ConnectionError) as error:
        raise Unreachable(
            "UNREACHABLE", f"The cluster has no application {app!r} that answers: {error}"
        ) from error
    return LoraServe(base_url, api_key, mounts={_origin(base_url): _Handled(handle, base_url)})


class _Handled(httpx.BaseTransport):
    """Carries requests to the gateway by its deployment's handle."""

    def __init__(self, handle: DeploymentHandle, base_url: str) -> None:
        self._handle = handle
        # What a proxy in front of the gateway takes off.
        self._prefix = httpx.URL(base_url).path.rstrip("/")

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        target = request.url.raw_path.decode("ascii").removeprefix(self._prefix)
        asked = request.method, target, request.headers.raw, request.read()
        timeout_s = request.extensions["timeout"]["read"]
        try:
            status, headers, content = _outside_of_loops(
                lambda: self._handle.exchange.remote(*asked).result(timeout_s=timeout_s)
            )
        except TimeoutError as error:
            raise httpx.ReadTimeout("the gateway did not answer in time", request=request) from error
        except (RayServeException, RayError, ConnectionError) as error:
            # Its replica has died, perhaps after it had acted.
            raise httpx.ReadError(f"{type(error).__name__}: {error}", request=request) from error
        return httpx.Response(status, headers=headers, content=content)


def _outside_of_loops(call: Callable[[], T]) -> T:
    """Call on a thread of its own: a notebook runs an event loop on this one, where handles do not block."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def _origin(base_url: str) -> str:
    url = httpx.URL(base_url)
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _connect_ray(address: str | None) -> None:
    import ray

    before = os.environ.get(_IGNORE)
    # We compare ourselves, to say more than Ray does.
    os.environ[_IGNORE] = "1"
    try:
        context: Any = ray.init(address)
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


def check_versions(ray_version: str, python_version: str) -> None:
    """Raise `LoraServeError` unless Ray client works from here to a cluster of these versions."""
    import ray

    wanted, own = _minor(python_version), _minor(platform.python_version())
    if (ray_version, wanted) == (ray.__version__, own):
        return
    install = f'`pip install "ray[client,serve]=={ray_version}"`'
    if wanted != own:
        install = f"Python {wanted}, and in it {install}"
    raise LoraServeError(
        "VERSION_MISMATCH",
        f"The cluster has Python {python_version} and Ray {ray_version}, here are Python"
        f" {platform.python_version()} and Ray {ray.__version__}: install {install}, or use HTTP, which takes"
        " any.",
        {"ray": ray_version, "python": python_version},
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
