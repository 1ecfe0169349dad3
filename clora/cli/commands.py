"""The command line: argument handling and nothing else. Every command imports its job when it is called, so
that `clora --help` answers at once. Exit codes are those of `clora.cli.app`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clora.cli import artefacts, edit_options, lora_files, serving, study
from clora.cli.app import BAD_INPUT, FAILED, app, command, is_main, run_command, say
from clora.cli.output import Json, print_json, print_plan, print_report, print_table
from clora.errors import InputError

if TYPE_CHECKING:
    from clora.config import Config

__all__ = ["app", "main", "train_main"]

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Configuration values that win over the file's."),
]
Resume = Annotated[
    str | None, typer.Option(metavar="latest|PATH", help="Go on from the newest checkpoint, or from this.")
]


def main() -> None:
    """The console script `clora`, and `python -m clora`."""
    run_command(sys.argv[1:])


def train_main() -> None:
    """The console script `clora-train`: `clora train`."""
    run_command(["train", *sys.argv[1:]])


@command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write into.")],
    effects: Annotated[int, typer.Option(min=1, help="How many effects of the tiny world.")] = 12,
    size: Annotated[
        Literal["full", "long", "smoke"],
        typer.Option(help="long: more training; smoke: seconds, to see that it runs."),
    ] = "full",
    seed: Annotated[int, typer.Option(min=0, help="Of every random draw.")] = 0,
) -> None:
    """Teach, distil and compare effects of the tiny world.

    Writes report.html, report.json and grid.png; interrupted, a second call goes on where it was.

    \b
    Example:
      clora demo --out runs/demo
    """
    from clora.jobs.demo import run_demo

    typer.echo(run_demo(out, effects, size, seed))


@command("validate")
def validate(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a configuration and every file it names.

    All faults are listed; no GPU is needed and nothing is downloaded.

    \b
    Example:
      clora validate config.yaml
      clora validate config.yaml train.batch_size=2 --json
    """
    from clora.jobs.validate import validate_file

    report = validate_file(config, overrides or [])
    if as_json:
        print_json(report.to_json())
    else:
        say(report.faults)
        for warning in report.warnings:
            typer.echo(f"warning: {warning}", err=True)
        checked = f"{report.num_effects} effects, {report.num_pairs} pairs, {report.num_images} images"
        verdict = "ok" if report.ok else f"{len(report.faults)} faults"
        typer.echo(f"{config}: {verdict} ({checked}, {len(report.warnings)} warnings)")
    if not report.ok:
        raise typer.Exit(BAD_INPUT)


@command("prompts")
def prompts(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Effects file to write; default: effects.jsonl in output_dir.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Give every effect its trigger and student prompt (AOP).

    They are written to a file that `effects:` of a configuration can name.

    \b
    Example:
      clora prompts config.yaml --output effects.jsonl
    """
    from clora.jobs.prompts import write_prompts

    written = write_prompts(_load(config, overrides), output)
    rows = [
        {"effect": prompt.name, "trigger": prompt.trigger, "prompt": prompt.text, "from": prompt.origin}
        for prompt in written
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(rows)


@command("cache")
def cache(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Encode everything and make the targets, ahead of training.

    \b
    Example:
      clora cache config.yaml
    """
    from clora.jobs.train import make_caches

    counts = make_caches(_load(config, overrides))
    if not is_main():
        return
    if as_json:
        print_json(counts)
    else:
        print_table([{"effect": name, "examples": count} for name, count in counts.items()])


@command("teach")
def teach(
    config: ConfigFile,
    overrides: Overrides = None,
    joint: Annotated[bool, typer.Option("--joint", help="One LoRA on all effects: the baseline.")] = False,
    resume: Resume = None,
) -> None:
    """Teach a LoRA to every effect that has none.

    All are taught side by side, from their pairs; prints the files.

    \b
    Example:
      clora teach config.yaml
      clora teach config.yaml teach.max_train_steps=1000 --resume latest
    """
    from clora.jobs.teach import teach as run

    paths = run(_load(config, overrides), joint, resume).values()
    if is_main():
        typer.echo("\n".join(map(str, paths)))


@command("plan-groups")
def plan_groups(
    config: ConfigFile,
    overrides: Overrides = None,
    max_effects: Annotated[int, typer.Option(min=1, help="Effects in one collection, at most.")] = 100,
    output: Annotated[Path | None, typer.Option(help="Folder to write into; default: groups in output_dir.")] = None,
    as_json: Json = False,
) -> None:
    """Split many effects into several collections, similar ones apart.

    Writes a configuration for each group, and groups.json, which `clora edit --lora` takes.

    \b
    Example:
      clora plan-groups config.yaml --max-effects 60
    """
    from clora.jobs import plan_groups as groups

    loaded = _load(config, overrides)
    plan = groups.plan_groups(loaded, max_effects)
    path = groups.write_groups(loaded, plan, output or loaded.output_dir / "groups")
    rows = plan.to_json()
    if as_json:
        print_json({"output": str(path), "groups": rows})
    else:
        print_table([row | {"effects": len(row["effects"])} for row in rows])
        typer.echo(path)


@command("train")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print memory and cost; train nothing.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Of --plan: number of GPUs.")] = 1,
    memory: Annotated[float, typer.Option(min=1, help="Of --plan: GB of one GPU; an H200 has 141.")] = 141,
    forward_seconds: Annotated[
        float | None, typer.Option(min=0, help="Of --plan: of a GPU's forward of a sample; default: an H200's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of --plan: print JSON, for programs.")] = False,
) -> None:
    """Distil all effects and few-step sampling into one LoRA.

    Prints the file; without effects it is the acceleration LoRA.
    With --plan the exit code is 0 where the run fits, else 1.

    \b
    Example:
      clora train config.yaml
      clora train config.yaml train.max_train_steps=2000 --resume latest
      clora train config.yaml --plan --gpus 8 --memory 80
      torchrun --nproc_per_node 8 -m clora train config.yaml
      torchrun --nnodes 2 --nproc_per_node 8 --rdzv_endpoint HOST:29500 -m clora train config.yaml
    """
    if plan:
        from clora.jobs.plan import SECONDS_PER_FORWARD, plan_training

        seconds = SECONDS_PER_FORWARD if forward_seconds is None else forward_seconds
        found = plan_training(_load(config, overrides), gpus, memory, seconds)
        print_json(found.to_json()) if as_json else print_plan(found)
        if not found.fits:
            raise typer.Exit(FAILED)
        return
    if as_json:
        raise InputError("--json: belongs to --plan; add it, or leave --json out")
    from clora.jobs.train import train as run

    path = run(_load(config, overrides), resume)
    if is_main():
        typer.echo(path)


@command("extend")
def extend(
    collection: Annotated[Path, typer.Argument(metavar="COLLECTION", help="Collection to start from.")],
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Add effects to a collection, in about a hundred updates.

    The configuration names the new effects; the old ones are rehearsed from the collection itself.

    \b
    Example:
      clora extend collection.safetensors new.yaml
      clora extend collection.safetensors new.yaml extend.max_train_steps=200 --resume latest
    """
    from clora.jobs.extend import extend as run
    from clora.lora.catalogue import read_catalogue

    path = run(collection, _load(config, overrides), resume)
    if not is_main():
        return
    if as_json:
        catalogue = read_catalogue(path)
        names = [entry.name for entry in catalogue.effects]
        print_json({"output": str(path), "version": catalogue.version, "effects": names})
    else:
        typer.echo(path)


@command("edit")
def edit(
    image: edit_options.Images,
    output: edit_options.Output,
    reference: edit_options.References = None,
    lora: edit_options.Lora = None,
    base: edit_options.Base = None,
    effect: edit_options.Effects = None,
    prompt: edit_options.Prompt = None,
    seed: edit_options.Seeds = None,
    steps: edit_options.Steps = None,
    guidance: edit_options.Guidance = None,
    grid: edit_options.Grid = False,
    columns: edit_options.Columns = None,
    batch_size: edit_options.BatchSize = 1,
    device: edit_options.Device = None,
    dtype: edit_options.Dtype = None,
    artefact: edit_options.Artefact = None,
    key: edit_options.Key = None,
    as_json: Json = False,
) -> None:
    """Edit images with a collection, or with any LoRA file.

    Each result is written as soon as it is made, in the shape of its image.

    \b
    Example:
      clora edit --base tiny --image in.png --effect sepia --output out.png
      clora edit --lora collection.safetensors --image a.png --image b.png \\
          --effect NAME --effect SECOND --output results/
      clora edit --lora collection.safetensors --image room.png --reference chair.png --effect NAME --output out.png
      clora edit --lora collection.safetensors --image in.png --grid --columns 8 --output grid.html
      clora edit --artefact DIR --image in.png --effect NAME --output out.png
    """
    from clora.inference.edit_plan import EditRequest
    from clora.jobs.edit import edit_files

    request = EditRequest(
        images=tuple(image),
        output=output,
        base=base,
        lora=lora,
        effects=tuple(effect or ()),
        prompt=prompt,
        references=tuple(reference or ()),
        seeds=tuple(seed or (0,)),
        steps=steps,
        guidance=guidance,
        grid=grid,
        columns=columns,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    paths = [str(path) for path in edit_files(request, artefact=artefact, key=key)]
    if as_json:
        print_json({"outputs": paths})
    else:
        typer.echo("\n".join(paths))


@command("eval")
def evaluate(
    config: ConfigFile,
    lora: Annotated[Path | None, typer.Option(help="Collection to evaluate on the configuration's own pairs.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Measure how well a collection does each effect, or run a benchmark of several methods.

    \b
    Example:
      clora eval config.yaml --lora runs/demo/collection.safetensors --json
      clora eval benchmark.yaml
    """
    from clora.jobs.eval_bench import benchmark_table, evaluate_benchmark, is_benchmark

    if is_benchmark(config):
        if lora is not None or overrides:
            raise InputError(f"{config}: a benchmark names its methods itself; leave --lora and KEY=VALUE out")
        figures = evaluate_benchmark(config)
        if not figures:
            return  # another process writes the tables
        if not as_json:
            print_table(benchmark_table(figures))
            return
    else:
        from clora.jobs.eval import evaluate_collection
        from clora.training.distributed import world_size

        if world_size() > 1:
            raise InputError(f"{config}: `clora eval --lora` is one process; start it without torchrun")
        if lora is None:
            raise InputError("--lora: give the collection to evaluate, or a benchmark with methods: in place of CONFIG")
        figures = evaluate_collection(_load(config, overrides), lora)
    if as_json:
        print_json(figures)
    else:
        print_report(figures)


command("inspect")(lora_files.inspect)
command("convert")(lora_files.convert)
command("export")(artefacts.export)
command("verify")(artefacts.verify)
command("serve")(serving.serve)
command("study")(study.study)


def _load(path: Path, overrides: Sequence[str] | None) -> Config:
    from clora.config import load_config

    return load_config(path, overrides or [])
