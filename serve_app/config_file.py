"""Render serve_config.yaml from the catalogue: the gateway, and one application per model family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from deployments.catalog import CATALOG
from serve_app.deployment_options import GATEWAY_OPTIONS, HTTP_OPTIONS, worker_options
from serve_app.settings import GatewayArgs

_HEADER = """\
# Rendered by `lora-serve config`; run with `serve run serve_config.yaml`.
# Numbers may be edited in place; a change of args, import paths or policies restarts that application.
# Paths, BASE_URL and DEVICE come from the environment (docs/architecture.md, "Settings").
"""


class _Dumper(yaml.SafeDumper):
    """Writes every block in full: an operator edits one model's numbers, not all of them at once."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def render_config(models: Sequence[str]) -> str:
    """Return the YAML text for `models`, ids of the catalogue in any order; KeyError for another id."""
    rows = [CATALOG[model] for model in models]
    # The preview of one may be rendered by another.
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
