"""The command of the blind study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clora.cli.output import Json, print_json, print_table
from clora.errors import InputError


def study(
    bench: Annotated[Path | None, typer.Argument(metavar="[BENCH.yaml]", help="Benchmark whose results exist.")] = None,
    methods: Annotated[list[str] | None, typer.Option("--method", help="A method to compare; default: four.")] = None,
    output: Annotated[Path, typer.Option(help="Page to write; its key goes beside it.")] = Path("study.html"),
    items: Annotated[int, typer.Option(min=1, max=500, help="How many results are shown.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the choice and of the order.")] = 0,
    tally: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Count answers; repeat it.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Of --tally: the study's key.")] = None,
    as_json: Json = False,
) -> None:
    """Ask people which of several methods' results is best, blind, and count their answers.

    \b
    Example:
      clora study benchmark.yaml --method collection --method teachers --output study.html
      clora study --tally answers-1.json --tally answers-2.json --key study.key.json
    """
    from clora.evaluate.study import preference_table
    from clora.jobs.study import count_study, write_study

    if tally:
        if key is None or bench is not None:
            raise InputError("--tally: needs --key, the .key.json beside the page, and no benchmark")
        found = count_study(key, tally)
        if as_json:
            print_json([one.model_dump() for one in found])
        else:
            print_table(preference_table(found))
        return
    if bench is None:
        raise InputError("study: give a benchmark to make a page of, or --tally and --key")
    page, key_path = write_study(bench, methods or [], output, items, seed)
    typer.echo(f"{page} (send it); {key_path} (keep it)")
