"""The HTTP gateway, the client, the command line, and the builders that serve_config.yaml names.

Importing this package loads neither Ray nor torch, because the client also runs on machines without them.
"""

# No `from __future__ import annotations`: Ray reads a builder's annotation to validate its arguments.
from typing import TYPE_CHECKING

from serve_app.settings import GatewayArgs, ModelsArgs

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["build_gateway", "build_models"]


def build_gateway(args: GatewayArgs) -> "Application":
    """Build the HTTP application at `/`. It is stateless and needs no GPU."""
    from serve_app.builders import gateway

    return gateway(args)


def build_models(args: ModelsArgs) -> "Application":
    """Build one worker deployment for each model id of `args.models`, bound by a root that serves nothing."""
    from serve_app.builders import models

    return models(args)
