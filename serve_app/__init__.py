"""What clients touch: the HTTP gateway, the command line, and the builders that serve_config.yaml names.

Importing this package loads neither Ray nor torch: the client uses it on machines that have neither.
"""

# No postponed annotations here: Ray reads a builder's annotation to validate its arguments.
from typing import TYPE_CHECKING

from serve_app.settings import GatewayArgs, ModelsArgs

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["build_gateway", "build_models"]


def build_gateway(args: GatewayArgs) -> "Application":
    """Build the HTTP application at `/`; stateless, on CPU."""
    from serve_app.builders import gateway

    return gateway(args)


def build_models(args: ModelsArgs) -> "Application":
    """Build one worker deployment per model id of `args.models`, under a root that only binds them."""
    from serve_app.builders import models

    return models(args)
