"""The command line `lora-serve`. Heavy modules are imported only by the commands that need them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from deployments.catalog import CATALOG
from deployments.spec.formats import FileFormat
from serve_app.cli import batch, jobs, requests
from serve_app.settings import RenderArgs, Settings

app = typer.Typer(
    help="LoRA inference for diffusion models on Ray Serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(jobs.app, name="jobs")
app.add_typer(batch.app, name="batch")
for command in (requests.submit, requests.get, requests.cancel):
    app.command()(command)


@app.command()
def config(
    models: Annotated[str, typer.Option(help="Model ids, separated by commas; all by default.")] = "",
) -> None:
    """Print serve_config.yaml for a GPU cluster."""
    from serve_app.config_file import render_config

    chosen = [name.strip() for name in models.split(",") if name.strip()] or list(CATALOG)
    unknown = [name for name in chosen if name not in CATALOG]
    if unknown:
        raise typer.BadParameter(f"no such model: {', '.join(unknown)}; choose from {', '.join(CATALOG)}")
    typer.echo(render_config(chosen), nl=False)


@app.command()
def models(
    gpu: Annotated[float | None, typer.Option(min=1, help="Memory of one GPU in GiB.")] = None,
    url: Annotated[str | None, typer.Option(help="List the models of this server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --url: one JSON object per line.")] = False,
) -> None:
    """List the models, the GPU memory that each OFFLOAD_MODE needs, and the fastest mode that fits a GPU."""
    if url is None and not as_json:
        from serve_app.cli.models_table import models_table

        typer.echo(models_table(gpu), nl=False)
    elif url is not None and gpu is None:
        requests.models(url, as_json)
    else:
        raise typer.BadParameter("--json needs --url; --gpu cannot be used with --url")


@app.command()
def render(
    requests: Annotated[
        list[Path], typer.Argument(help="JSON files with one body of POST /v1/inference each.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for the results, one folder per request.")],
    checkpoints: Annotated[
        Path | None, typer.Option(help="Directory with the checkpoints, each in a folder org--name.")
    ] = None,
    loras: Annotated[
        Path | None, typer.Option(help="Directory that LoRA paths in requests are relative to.")
    ] = None,
    file_format: Annotated[FileFormat, typer.Option("--format", help="Output format.")] = "npy",
    device: Annotated[str | None, typer.Option(help="Device: auto, cuda or cpu.")] = None,
) -> None:
    """Render requests in this process, without Ray. Write the outputs and a manifest of each request."""
    names = [path.stem for path in requests]
    if len(set(names)) != len(names):
        raise typer.BadParameter(
            "two requests have the same file name, so their results would overwrite each other"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from serve_app.cli.render import render_files

    given = {"checkpoints": checkpoints, "loras": loras, "device": device}
    # Precedence: options, then environment variables, then defaults.
    chosen = {key: value for key, value in given.items() if value is not None}
    # Whoever runs this command has the token anyway.
    settings = RenderArgs().model_copy(update={"hub_token_for_requests": True, **chosen})
    raise typer.Exit(render_files(requests, settings, out, file_format))


@app.command()
def inspect(
    lora: Annotated[str, typer.Argument(help="A .safetensors file, or a URL, hf:// or s3:// reference.")],
) -> None:
    """Print a LoRA's format, ranks and fitting models as JSON. Reads only the header of the file."""
    from cluster.failures import JobFailure
    from deployments.loras.format.inspection import inspect_file
    from serve_app.admission.inspection import Inspector
    from serve_app.wire.refusals import Refusal

    file = Path(lora)
    own = Settings().model_copy(update={"hub_token_for_requests": True})
    try:
        found = inspect_file(file) if file.is_file() else Inspector(own).inspect(lora)
    except JobFailure as failure:
        reason = f"{failure.code}: {failure.message}"
    except Refusal as refusal:
        reason = f"{refusal.code}: {refusal.details['reason']}"
    except OSError as error:
        reason = f"FILE_ERROR: {error.strerror}: {error.filename}"
    else:
        typer.echo(found.model_dump_json(indent=2))
        return
    typer.echo(f"{lora}: {reason}", err=True)
    raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Use this model's real checkpoint.")] = None,
    lora: Annotated[Path | None, typer.Option(help="A .safetensors file, with --model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw, with --model.")] = None,
    image: Annotated[Path | None, typer.Option(help="Control image, for models that edit.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep serving until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(help="HTTP port on 127.0.0.1.")] = 8000,
    folder: Annotated[Path, typer.Option(help="Directory for checkpoints, LoRAs, jobs and pictures.")] = Path(
        "var/demo"
    ),
) -> None:
    """Start Ray Serve, render real requests over HTTP, save the pictures, and print where they are."""
    from serve_app.cli.demo import run_demo

    if model is not None and model not in CATALOG:
        raise typer.BadParameter(f"no such model: {model}; choose from {', '.join(CATALOG)}")
    if model is not None and (lora is None or prompt is None):
        raise typer.BadParameter("--model needs --lora and --prompt")
    raise typer.Exit(
        run_demo(folder, model=model, lora=lora, prompt=prompt, image=image, keep=keep, port=port)
    )


def main() -> None:
    """Entry point of the console script."""
    app()
