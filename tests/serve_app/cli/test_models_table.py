from __future__ import annotations

from typer.testing import CliRunner

from deployments.catalog import CATALOG
from serve_app.cli.main import app


def test_it_says_what_fits_how() -> None:
    result = CliRunner().invoke(app, ["models", "--gpu", "80"])
    assert result.exit_code == 0
    head, *lines = result.stdout.splitlines()
    assert head.endswith("on 80 GiB")
    assert [line.split()[0] for line in lines] == list(CATALOG)
    chosen = {line.split()[0]: line.split()[-1] for line in lines}
    assert (chosen["flux"], chosen["flux2"]) == ("none", "text")


def test_without_a_gpu_it_tells_the_needs() -> None:
    result = CliRunner().invoke(app, ["models"])
    assert result.stdout.splitlines()[0].split() == ["model", "none", "text", "model", "group"]
