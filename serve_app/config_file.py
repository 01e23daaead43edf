"""Renders serve_config.yaml from the catalogue: the gateway, and one application per model family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from deployments.catalog import CATALOG
from serve_app.deployment_options import GATEWAY_OPTIONS, HTTP_OPTIONS, worker_options
from serve_app.settings import GatewayArgs

_HEADER = """\
# Rendered by `lora-serve config`; run it with `serve run serve_config.yaml`.
# You can edit numbers in place. A change of args, import paths or policies restarts that application.
# Paths, BASE_URL and DEVICE come from the environment (docs/operations.md, "Settings").
"""


class _Dumper(yaml.SafeDumper):
    """Writes every block in full, without YAML aliases, so that each model's numbers can be edited."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def render_config(models: Sequence[str]) -> str:
    """Return the YAML text for `models`, ids in any order. Raises `KeyError` for an unknown id."""
    rows = [CATALOG[model] for model in models]
    # Another model may render the previews of one.
    wanted = {row.id for row in rows} | {row.sampled("preview").id for row in rows}
    families: dict[str, list[str]] = {}
    for row in CATALOG.values():
        if row.id in wanted:
            families.setdefault(row.family, []).append(row.id)
    jobs = GatewayArgs.model_fields["jobs"].default
    config = {
        "proxy_location": "EveryNode",
        "http_options": HTTP_OPTIONS,
        "applications": [
            {
                "name": "gateway",
                "route_prefix": "/",
                "import_path": "serve_app:build_gateway",
                "args": {"jobs": jobs},
                "deployments": [{"name": "gateway", **GATEWAY_OPTIONS}],
            },
            *(_application(family, members, jobs) for family, members in families.items()),
        ],
    }
    return _HEADER + yaml.dump(config, Dumper=_Dumper, sort_keys=False, width=110)


def _application(family: str, models: list[str], jobs: str) -> dict[str, Any]:
    return {
        "name": family,
        "route_prefix": None,
        "import_path": "serve_app:build_models",
        "args": {"models": models, "jobs": jobs},
        "deployments": [{"name": model, **worker_options(model, jobs)} for model in models],
    }
