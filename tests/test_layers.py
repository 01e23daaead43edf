"""Imports go down: among the packages, inside each package among its rooms, and nowhere in a circle.

Rooms of one line may not import each other. Imports inside functions count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]

LAYERS = """
serve_app.cli
serve_app
serve_app.builders serve_app.config_file serve_app.batch
serve_app.gateway serve_app.deployment_options serve_app.client
serve_app.background
serve_app.admission
serve_app.settings
serve_app.wire
deployments.worker deployments.autoscaling
deployments.pipelines
deployments.engine
deployments.loras.adapters
deployments.loras.sources
deployments.loras.format
deployments.settings
deployments.catalog
deployments.spec
cluster.jobs
cluster.databases cluster.objects cluster.net cluster.secrets
cluster.durable cluster.failures cluster.telemetry cluster.metrics
"""
"""From the top down: a room may import what is on a lower line."""

DEPTH = {room: depth for depth, line in enumerate(LAYERS.split("\n")) for room in line.split()}

BY_NAME = ("deployments.catalog", "deployments.pipelines")
"""Rows name the functions of pipelines for type checkers alone; at run time they are `Lazy`."""


def room_of(module: str) -> str:
    """Return the room that a module is in: the longest name in `LAYERS` that begins its own."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    # A package that only groups rooms, such as `deployments` itself, is in none of them.
    return next((name for name in names if name in DEPTH and (name != "serve_app" or len(parts) == 1)), "")


def imports_of(source: str, modules: set[str]) -> Iterator[str]:
    """Yield the modules of this project that a module's text imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def read_graph() -> dict[str, set[str]]:
    """Return what each module of the three packages imports of them."""
    files = [
        file for package in ("serve_app", "deployments", "cluster") for file in (ROOT / package).rglob("*.py")
    ]
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }
    texts = {name: file.read_text(encoding="utf-8") for name, file in names.items()}
    return {name: set(imports_of(text, set(texts))) & set(texts) for name, text in texts.items()}


def wrong_arrows(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports that do not go down."""
    arrows = ((module, imported) for module, found in graph.items() for imported in found)
    between = ((each, room_of(each[0]), room_of(each[1])) for each in arrows)
    return [
        " -> ".join(arrow)
        for arrow, source, target in between
        if source and target and source != target and (source, target) != BY_NAME
        if DEPTH[source] >= DEPTH[target]
    ]


def test_imports_go_down() -> None:
    assert not wrong_arrows(read_graph())


def test_no_circle() -> None:
    graph = read_graph()
    TopologicalSorter(graph).prepare()


def test_every_module_is_in_a_room() -> None:
    grouping = {"deployments", "deployments.loras", "cluster"}
    assert {module for module in read_graph() if not room_of(module)} == grouping


def test_an_arrow_that_is_turned_round_is_found() -> None:
    graph = read_graph()
    graph["cluster.objects.store"] = {"cluster.jobs.queue"}
    graph["serve_app.admission.admit"].add("serve_app.gateway.shared")
    assert sorted(wrong_arrows(graph)) == [
        "cluster.objects.store -> cluster.jobs.queue",
        "serve_app.admission.admit -> serve_app.gateway.shared",
    ]
