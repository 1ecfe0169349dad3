"""The fields of an edit as OpenAI's clients send them, and what else an edit may say."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from clora.method.prompts import compose_prompts
from clora.serve.offer import Offer, OutputFormat
from clora.serve.problems import Problem, bad
from clora.serve.settings import Limits

FORMATS: Mapping[str, OutputFormat] = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp"}
IMAGE_FIELDS = ("image", "image[]")
MOST_SEED = 2**63 - 1
MOST_USER = 256
# What OpenAI's clients may send and this model has one answer for; anything else is refused.
FIXED = {
    "background": ("auto", "opaque"),
    "quality": ("auto",),
    "input_fidelity": ("high", "low"),
    "moderation": ("auto", "low"),
    "stream": ("false",),
    "partial_images": ("0",),
}
FIELDS = (
    "prompt", "model", "n", "size", "response_format", "output_format", "output_compression", "user", "effect",
    "effect[]", "seed", "steps", *FIXED,
)  # fmt: skip
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class Edit:
    """What is asked for of `model`. `text` is what it reads; size (height, width) None: the shape of the last image."""

    model: str
    text: str
    effects: tuple[str, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int] | None
    output_format: OutputFormat
    quality: int


def parse_edit(
    fields: Mapping[str, Sequence[str]], offers: Mapping[str, Offer], limits: Limits, effects_at: str
) -> Edit:
    """The edit that a form's fields ask for, of one of the models; raises `Problem` for the first that is wrong.

    An unknown effect or model is 404, with the nearest names; everything else is 400. Without a model it is the one
    that has the effects. Without a seed one is drawn. `effects_at` says where effects are listed.
    """
    _check_names(fields)
    single = {name: values[0] for name, values in fields.items() if values and name not in ("effect", "effect[]")}
    _check_fixed(single)
    given = [*fields.get("effect", ()), *fields.get("effect[]", ())]
    asked = find_models(single.get("model", "").strip(), offers)
    effects = find_effects(given, {name for offer in asked for name in offer.collection.effects}, effects_at)
    offer = choose_model(asked, effects)
    _check_steps(single, offer)
    if len(single.get("user", "")) > MOST_USER:
        raise bad(f"user: is longer than {MOST_USER} characters; shorten it", "user")
    count = _integer(single, "n", 1, 1, limits.samples)
    first = _integer(single, "seed", secrets.randbelow(2**31), 0, MOST_SEED - limits.samples)
    kind = single.get("output_format") or "png"
    if kind not in FORMATS:
        raise bad(f"output_format: {shown(kind)} is none of png, jpeg and webp; give one of them", "output_format")
    return Edit(
        model=offer.name,
        text=_text(single.get("prompt", ""), effects, offer, limits),
        effects=effects,
        seeds=tuple(range(first, first + count)),
        size=parse_size(single.get("size", "auto"), offer),
        output_format=FORMATS[kind],
        quality=_integer(single, "output_compression", 95, 0, 100),
    )


def find_models(name: str, offers: Mapping[str, Offer]) -> list[Offer]:
    """The model of that name, all for ""; `Problem` 404 with the nearest names for one that is unknown."""
    if not name:
        return list(offers.values())
    if name not in offers:
        message = f"model {shown(name)} is not served here; {_hint(name, offers, 'GET /v1/models')}"
        raise Problem(404, message, "model_not_found", param="model", extra={"nearest": _nearest(name, offers)})
    return [offers[name]]


def find_effects(given: Sequence[str], known: Collection[str], effects_at: str) -> tuple[str, ...]:
    """One or two effects' names from values that are a name, or names with commas between them.

    Raises `Problem`: 404 with the nearest names for one that is unknown, 400 for more than two.
    """
    names: list[str] = []
    for value in given:
        whole = value.strip()
        names += [whole] if whole in known else [part.strip() for part in whole.split(",")]
    names = [name for name in names if name]
    for name in names:
        if name not in known:
            message = f"effect {shown(name)} is not in this collection; {_hint(name, known, effects_at)}"
            raise Problem(404, message, "effect_not_found", param="effect", extra={"nearest": _nearest(name, known)})
    if len(names) > 2:
        raise bad(f"effect: {len(names)} were given, two can be composed; name one or two", "effect")
    if len(set(names)) != len(names):
        raise bad("effect: the same one is given twice; name it once", "effect")
    return tuple(names)


def choose_model(asked: Sequence[Offer], effects: Collection[str]) -> Offer:
    """The one that has all the effects; `Problem` 400 where none has, or several."""
    fitting = [offer for offer in asked if set(effects) <= set(offer.collection.effects)]
    if not fitting:
        raise bad("effect: the two are of different models; apply them one after the other", "effect")
    if len(fitting) > 1:
        names = ", ".join(offer.name for offer in fitting)
        raise bad(f"model: {names} could do this; name one of them", "model")
    return fitting[0]


def parse_size(value: str, offer: Offer) -> tuple[int, int] | None:
    """(height, width) of "WIDTHxHEIGHT", None for "auto"; `Problem` 400 for one that the model cannot make."""
    if value in ("", "auto"):
        return None
    match = SIZE.fullmatch(value)
    unit = offer.unit
    if match is None or int(match[1]) % unit or int(match[2]) % unit:
        raise bad(f"size: {shown(value)} is not auto or WIDTHxHEIGHT in multiples of {unit}; give such a one", "size")
    width, height = int(match[1]), int(match[2])
    if width * height > offer.result_pixels or max(width, height) > 16 * min(width, height):
        side = math.isqrt(offer.result_pixels) // unit * unit
        raise bad(f"size: {value} is beyond {offer.result_pixels} pixels or 16:1; try {side}x{side}", "size")
    return height, width


def shown(value: str) -> str:
    """A client's text as it may stand in an answer: quoted, escaped, short."""
    return repr(value if len(value) <= 80 else f"{value[:77]}...")


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    return get_close_matches(name, sorted(known), 3)


def _hint(name: str, known: Iterable[str], where: str) -> str:
    near = _nearest(name, known)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"{where} lists them"


def _check_names(fields: Mapping[str, Sequence[str]]) -> None:
    for name, values in fields.items():
        if name in IMAGE_FIELDS:
            raise bad("image: send the picture itself as a file; no address or path is opened", "image")
        if name == "mask" or name not in FIELDS:
            near = get_close_matches(name, FIELDS, 1)
            hint = f"did you mean {near[0]}?" if near and name != "mask" else "leave it out"
            raise bad(f"{shown(name)} is no field of an edit here; {hint}", name[:80], "unknown_parameter")
        if len(values) > 1 and name not in ("effect", "effect[]"):
            raise bad(f"{name}: is there {len(values)} times; give it once", name)
        if any("\0" in value for value in values):
            raise bad(f"{name}: holds a null character; remove it", name)


def _check_fixed(single: Mapping[str, str]) -> None:
    kind = single.get("response_format", "b64_json")
    if kind not in ("", "b64_json"):
        raise bad(f"response_format: {shown(kind)} is not offered, results are not kept for a url; ask for b64_json",
                  "response_format")  # fmt: skip
    for name, allowed in FIXED.items():
        if single.get(name, "") not in ("", *allowed):
            raise bad(f"{name}: {shown(single[name])} is not offered; leave it out", name)


def _check_steps(single: Mapping[str, str], offer: Offer) -> None:
    if single.get("steps", "").strip() and _integer(single, "steps", 0, 1, 1000) != offer.collection.num_steps:
        raise bad(f"steps: this model was distilled for {offer.collection.num_steps}; leave it out", "steps")


def _text(prompt: str, effects: tuple[str, ...], offer: Offer, limits: Limits) -> str:
    if len(prompt) > limits.prompt_chars:
        raise bad(f"prompt: is longer than {limits.prompt_chars} characters; shorten it", "prompt")
    if effects and prompt.strip():
        raise bad("prompt: an effect has its own; leave one of the two empty", "prompt")
    if not effects and not prompt.strip():
        raise bad("prompt: is empty and no effect is named; give one of the two", "prompt")
    texts = [offer.collection.effects[name].prompt for name in effects] or [prompt]
    return texts[0] if len(texts) == 1 else compose_prompts(*texts)


def _integer(single: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    value = single.get(name, "").strip()
    if not value:
        return default
    if not re.fullmatch(r"\d{1,20}", value, re.ASCII) or not least <= int(value) <= most:
        raise bad(f"{name}: {shown(value)} is no whole number from {least} to {most}; give one", name)
    return int(value)
