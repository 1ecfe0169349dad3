"""The options of `clora edit`: types and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Images = Annotated[list[Path], typer.Option(metavar="FILE", help="Image to edit; may be repeated.")]
Output = Annotated[Path, typer.Option(help="File to write, or a folder for several results.")]
References = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Picture shown before every image, as the first pictures of a pair in training; may be repeated. The"
        " image comes last and gives the result its shape.",
    ),
]
Lora = Annotated[
    Path | None, typer.Option(help="Collection, groups.json, or any LoRA file; default: the base's own collection.")
]
Base = Annotated[str | None, typer.Option(help="'tiny', a hub id or a folder; default: the collection's.")]
Effects = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Effect; two are applied one after the other.")]
Prompt = Annotated[str | None, typer.Option(help="Instruction, instead of an effect.")]
Seeds = Annotated[
    list[int] | None, typer.Option(metavar="N", min=0, help="Noise seed, 0 if not given; may be repeated.")
]
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help="Steps; default: the collection's, else 40.")]
Guidance = Annotated[float | None, typer.Option(min=1, help="Guidance scale; 1, the default of a collection, is none.")]
Grid = Annotated[bool, typer.Option("--grid", help="One contact sheet of every effect, a picture or an .html page.")]
Columns = Annotated[int | None, typer.Option(min=1, help="Of --grid: pictures in a row; default: about square.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images sampled at once.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda if there is one.")]
Dtype = Annotated[
    Literal["bfloat16", "float32"] | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")
]
Artefact = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of `clora export`, in place of a LoRA."),
]
Key = Annotated[
    Path | None, typer.Option(metavar="PUB", help="Of --artefact: public key in PEM, which must have signed it.")
]
