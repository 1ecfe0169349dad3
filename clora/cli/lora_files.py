"""The commands on LoRA files: what is in one, and one in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clora.cli.app import BAD_INPUT, say
from clora.cli.output import Json, print_json, print_report


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="LoRA file of any layout, or PEFT's folder.")],
    as_json: Json = False,
) -> None:
    """Show what is in a LoRA file, and a collection's effects.

    \b
    Example:
      clora inspect collection.safetensors --json
    """
    from clora.lora.catalogue import describe_file

    found = describe_file(file)
    if as_json:
        print_json(found)
    else:
        print_report(found)
        for note in found["lora"]["notes"]:
            typer.echo(f"note: {note}", err=True)
    if found["lora"]["faults"]:
        say(found["lora"]["faults"])
        raise typer.Exit(BAD_INPUT)


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="LoRA file of any layout and kind, or PEFT's folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, .safetensors; for peft a new folder.")],
    to: Annotated[Literal["diffusers", "comfyui", "kohya", "peft"], typer.Option(help="Layout to write.")],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Make modules above this rank the nearest of it, and tell what is lost."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="'tiny', a hub id or a folder; a DoRA needs it, others are held against it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rewrite a LoRA file in another tool's layout.

    LoHa, LoKr and whole updates become LoRAs: exactly, or with --rank the nearest ones.

    \b
    Example:
      clora convert lora.safetensors out.safetensors --to kohya
      clora convert collection.safetensors adapter --to peft
      clora convert lokr.safetensors out.safetensors --to comfyui --rank 64
    """
    from clora.jobs.convert import convert as run

    done = run(source, target, to, rank, base)
    if as_json:
        print_json({"output": str(target), "from": done.layout, "to": to, **done.to_json()})
        return
    for note in done.notes:
        typer.echo(f"note: {note}", err=True)
    what = f"{target}: {len(done.ranks)} modules, {done.layout} to {to}"
    typer.echo(what if rank is None else f"{what}, rank {done.max_rank}; {done.loss_sentence()}")
