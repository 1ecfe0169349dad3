"""The command that serves: options over a file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def serve(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[ARTEFACT|COLLECTION]", help="Folder of `clora export`, or a collection's file."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="'tiny', a hub id or a folder; default: the collection's.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings (YAML); options win over it.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; default: 127.0.0.1, this machine alone.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 chooses one; default: 8000.")] = None,
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="API keys; without, none are asked for.")] = None,
    open_to_all: Annotated[bool, typer.Option("--open-to-all", help="Bind elsewhere without keys.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the model, in /v1/models; default: clora.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda if there is one and an artefact can use it.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, typer.Option(help="Of a collection; default: as `clora edit`.")
    ] = None,
    grace: Annotated[float | None, typer.Option(help="Seconds for requests to end after SIGTERM; default: 30.")] = None,
    new_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Add an API key to FILE, print it, end.")] = None,
    key_name: Annotated[str, typer.Option(help="Of --new-key: whose it is.")] = "default",
) -> None:
    """Serve edits over HTTP, in the shape of OpenAI's API, with a page.

    Without a model it is the collection of the tiny base. docs/SERVING.md lists all settings.

    \b
    Example:
      clora serve
      clora serve artefact --port 9000 --keys keys.txt --host 0.0.0.0
      clora serve --new-key keys.txt --key-name alice
    """
    from clora.jobs import serve as job
    from clora.serve.settings import load_settings

    if new_key is not None:
        typer.echo(job.add_key(new_key, key_name))
        return
    given = {
        "base": base,
        "host": host,
        "port": port,
        "keys": keys,
        "open_to_all": open_to_all or None,
        "name": name,
        "device": device,
        "dtype": dtype,
        "grace_seconds": grace,
    }
    job.serve(load_settings(config, given | (job.find_model(model) if model is not None else {})))
