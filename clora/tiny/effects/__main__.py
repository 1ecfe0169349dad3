"""`python -m clora.tiny.effects`: every effect by family, with its prompts, criteria and what is drawn anew."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from clora.tiny.effects.table import EFFECTS


def print_effects(console: Console) -> None:
    """A table for each family; a star marks random outcomes, whose docstring says what is drawn anew."""
    for family, effects in groupby(EFFECTS.values(), key=lambda effect: effect.family):
        table = Table(title=family, title_justify="left", show_lines=False)
        for heading in ("effect", "teacher prompt", "student prompt", "criteria", "drawn anew"):
            table.add_column(heading)
        for effect in effects:
            anew = " ".join((effect.apply.__doc__ or "").split()) if effect.random else ""
            star = " *" if effect.random else ""
            table.add_row(effect.name + star, effect.prompt, effect.student_prompt, effect.criteria, anew)
        console.print(table)


if __name__ == "__main__":
    print_effects(Console())
