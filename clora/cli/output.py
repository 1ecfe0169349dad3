"""Results of commands on stdout: JSON for programs, tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from clora.jobs.plan import TrainPlan

# The option of every command that can print its result for programs.
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def print_json(value: Any) -> None:
    """Indented JSON; what JSON has no form for, as text."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_report(values: Mapping[str, Any]) -> None:
    """Single values as one table, each list of records as a table of its own."""
    single: list[dict[str, Any]] = []

    def collect(prefix: str, items: Mapping[str, Any]) -> None:
        for key, value in items.items():
            if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
                tables.append((f"{prefix}{key}", [{"": name, **row} for name, row in value.items()]))
            elif isinstance(value, Mapping) and value and not prefix:
                collect(f"{key}.", value)
            elif isinstance(value, list) and value and isinstance(value[0], Mapping):
                tables.append((f"{prefix}{key}", value))
            else:
                single.append({"": f"{prefix}{key}", "value": value})

    tables: list[tuple[str, list[Mapping[str, Any]]]] = []
    collect("", values)
    if single:
        print_table(single)
    for title, rows in tables:
        print_table(rows, title)


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Records of the same columns; a column that one lacks is empty there."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text, because names may hold what rich reads as markup.
        table.add_row(*(Text(_shown(row.get(column))) for column in columns))
    Console().print(table)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value) or "none"
    return str(value)


def print_plan(plan: TrainPlan) -> None:
    """Memory by phase, what is sent where there are several GPUs, the cost beside the paper's, and the verdict."""
    from clora.distill.memory import GB

    phases, sent = plan.to_json()["phases"], plan.communication
    parts = list(dict.fromkeys([*phases["encoding"], *phases["student update"]]))
    parts.remove("total")
    rows = [
        {
            "GB on each GPU": part,
            **{name: f"{phase[part] / GB:.2f}" for name, phase in phases.items() if part in phase},
        }
        for part in [*parts, "total"]
    ]
    print_table(rows)
    if plan.settings.num_gpus > 1:
        print_table([
            {"GB moved by each GPU": part, **{f"{name} update": f"{sent[name][part] / GB:.2f}" for name in sent}}
            for part in sent["student"]
        ])  # fmt: skip
    seconds = plan.seconds_per_forward
    print_table([
        {
            "a GPU": name,
            "forwards": f"{cost.forwards:,.0f}",
            f"hours at {seconds:g} s": f"{cost.hours(seconds):.1f}",
            "GB at least": f"{cost.least / GB:.1f}",
        }
        for name, cost in (("this run", plan.cost), ("by preset paper", plan.paper))
    ])  # fmt: skip
    typer.echo(plan.verdict)
