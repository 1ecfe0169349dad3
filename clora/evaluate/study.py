"""A blind study with people (the paper's Fig. 16): a page of candidates in random order, and the count of answers.

The page holds pictures and numbers alone. Which method made which candidate stands in the key, a file of its own that
stays with whoever runs the study.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clora.data.image_grid import png_data_uri
from clora.data.images import load_image
from clora.errors import InputError, InputErrors, raise_faults
from clora.evaluate.benchmark import Benchmark, Cell, cells, missing_results
from clora.evaluate.statistics import Groups, bootstrap_interval

QUESTIONS = {
    "quality": "Which result looks best as a picture?",
    "consistency": "Which result keeps the subject of the source best?",
    "alignment": "Which result does best what was asked?",
}
SIDE = 320  # pixels of a picture on the page, at most


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Key(_Record):
    """Which methods made the candidates of each item, in the page's order; `study` is the page's own name."""

    study: str
    methods: list[str]
    items: list[list[str]]


class Choice(_Record):
    item: Annotated[int, Field(ge=0)]
    question: str
    choice: Annotated[int, Field(ge=0)]


class Answers(_Record):
    """What one person's page writes."""

    study: str
    answers: list[Choice]


class Preference(_Record):
    """How often a method was chosen, with its 95 % bootstrap interval: persons and items are drawn anew, crossed."""

    method: str
    question: str
    share: float
    interval: tuple[float, float]
    answers: int


def build_study(bench: Benchmark, methods: Sequence[str], num_items: int, seed: int) -> tuple[str, Key]:
    """The page (HTML) and its key: `num_items` results drawn evenly over effects, each by every method.

    Raises `InputErrors` for unknown methods, fewer than two or more than nine, and for results that are not there.
    """
    known = [method.name for method in bench.methods]
    strange = [name for name in methods if name not in known]
    faults = [f"method {name}: is none of {', '.join(known)}; correct the name" for name in strange]
    if not 2 <= len(set(methods)) <= 9:
        faults.append(f"methods: a study compares 2 to 9 of them, {len(set(methods))} were given; name others")
    raise_faults(faults)
    chosen = _drawn(bench, methods, num_items, random.Random(seed))
    raise_faults(missing_results(bench, [cell for item in chosen for cell in item]))
    order = random.Random(seed + 1)
    instructions = {effect.name: effect.instruction for effect in bench.effects}
    shown, items = [], []
    for item in chosen:
        mixed = order.sample(item, len(item))
        items.append([cell.method for cell in mixed])
        pictures = [_picture(cell.path) for cell in mixed]
        asked = {"instruction": instructions[item[0].effect], "source": _picture(item[0].source)}
        shown.append(asked | {"candidates": pictures})
    name = f"{random.Random(json.dumps(items)).getrandbits(64):016x}"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    data = {"study": name, "questions": QUESTIONS, "items": shown}
    # "<" is written as an escape, so that no text can end the script element.
    page = environment.get_template("study.html.j2").render(data=json.dumps(data).replace("<", "\\u003c"))
    return page, Key(study=name, methods=list(dict.fromkeys(methods)), items=items)


def _drawn(bench: Benchmark, methods: Sequence[str], num_items: int, draw: random.Random) -> list[list[Cell]]:
    """Items, each the same result by every method; of every effect one before a second of any."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells(bench):
        if cell.method in methods:
            groups.setdefault((cell.category, cell.effect, cell.key), []).append(cell)
    by_effect: dict[str, list[list[Cell]]] = {}
    for item in groups.values():
        by_effect.setdefault(item[0].effect, []).append(item)
    queues = [draw.sample(items, len(items)) for items in by_effect.values()]
    rounds = [queue[place] for place in range(max(map(len, queues))) for queue in queues if place < len(queue)]
    chosen = rounds[:num_items]
    draw.shuffle(chosen)
    return chosen


def read_answers(path: Path, key: Key) -> Answers:
    """One person's answers. Raises `InputError` for a file that is none, of another study, or with an impossible
    choice; the last answer to a question counts."""
    try:
        found = Answers.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: holds no answers of a study ({error}); give the file that its page wrote") from error
    if found.study != key.study:
        raise InputError(f"{path}: is of study {found.study}, the key of {key.study}; give files of one study")
    for one in found.answers:
        if one.question not in QUESTIONS or one.item >= len(key.items) or one.choice >= len(key.items[one.item]):
            raise InputError(f"{path}: item {one.item} has no choice {one.choice} ({one.question}); have it done again")
    last = {(one.item, one.question): one for one in found.answers}
    return Answers(study=found.study, answers=list(last.values()))


def tally(key: Key, people: Sequence[Answers]) -> list[Preference]:
    """How often each method was chosen, question by question. Raises `InputErrors` where nobody answered."""
    if not any(person.answers for person in people):
        raise InputErrors(["answers: there are none; give the files that the page wrote"])
    found = []
    for question in QUESTIONS:
        chosen: dict[tuple[int, int], str] = {
            (number, one.item): key.items[one.item][one.choice]
            for number, person in enumerate(people)
            for one in person.answers
            if one.question == question
        }
        for method in key.methods if chosen else ():
            hits: Groups = {answer: [float(name == method)] for answer, name in chosen.items()}
            share = float(np.mean(list(hits.values())))
            found.append(
                Preference(
                    method=method,
                    question=question,
                    share=share,
                    interval=bootstrap_interval(hits),
                    answers=len(hits),
                )
            )
    return found


def read_key(path: Path) -> Key:
    """The key of a study. Raises `InputError` for a file that is none."""
    try:
        return Key.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: is no key of a study; give the .key.json beside its page") from error


def _picture(path: Path) -> str:
    picture = load_image(path)
    picture.thumbnail((SIDE, SIDE))
    return png_data_uri(np.asarray(picture), scale=max(1, SIDE // 2 // max(picture.size)))


def preference_table(found: Sequence[Preference]) -> list[Mapping[str, Any]]:
    """Rows for people: a method, and its share for each question with the interval."""
    methods = list(dict.fromkeys(one.method for one in found))
    cell = {
        (one.method, one.question): f"{one.share:.1%} [{one.interval[0]:.1%}, {one.interval[1]:.1%}]" for one in found
    }
    return [{"method": name} | {q: cell.get((name, q), "–") for q in QUESTIONS} for name in methods]
