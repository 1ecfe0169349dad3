"""A benchmark: effects, test pictures by category, methods, and how results are judged, in one YAML file.

    output_dir: results
    base: tiny
    effects:
      - {name: sepia, instruction: turn it into a sepia photo, criteria: All is brown., template: [a.png, a_sepia.png]}
    images:
      portrait: photos/portraits
      any: [photos/boat.jpg]
    methods:
      - {name: collection, lora: collection.safetensors}          # by its catalogue
      - {name: teachers, loras: "teachers/{effect}.safetensors"}  # one LoRA an effect, asked with the instruction
      - {name: fast, loras: "teachers/{effect}.safetensors", accelerate: lightning.safetensors}
      - {name: theirs, images: other_results}                     # made elsewhere
    judge: {url: "https://host/v1", model: some-vision-model}

Results lie as `results/METHOD/CATEGORY/EFFECT/KEY.png`, with `KEY_SRCIMG.png`, the picture that was edited, beside
each. KEY is the picture's name without its suffix, and `_SEED` where several seeds are asked for. A method that was
made elsewhere has the same folders below its `images`.

With `catalogue: collection.safetensors` an effect that is listed there needs no instruction, and `effects` may be left
out: they are all of that collection's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clora.data.images import SUFFIXES, load_image
from clora.errors import InputError, InputErrors, raise_faults
from clora.evaluate.metrics.encoders import EncoderName, encoder_fault
from clora.io.chat import Endpoint
from clora.io.text import read_yaml
from clora.lora.catalogue import read_catalogue

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+() -]{0,99}$")]  # a folder's name, of any system


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BenchEffect(_Section):
    """One effect. `template`: a picture and its right result, shown to the judge. `categories` None: all of them.

    `student_prompt` is what a user asks for in full, for methods that `ask` it and for a router; `of` names two effects
    of a collection that this one is made of, to be applied in turn.
    """

    name: Name
    instruction: str = Field(min_length=1, max_length=4000)
    student_prompt: str | None = Field(None, min_length=1, max_length=4000)
    of: tuple[str, str] | None = None
    criteria: str = Field("", max_length=4000)
    template: tuple[Path, Path] | None = None
    categories: list[str] | None = None


class BenchMethod(_Section):
    """One way to make the results: a collection, a LoRA for each effect, or pictures that are there already.

    `accelerate`: a few-step LoRA added to each, as stock `set_adapters` adds it; then few steps are taken. `ask`: what
    a LoRA without a catalogue is asked. `route`: the LoRA is picked by the text, not by the effect's name. What a
    method made elsewhere costs (`num_loras`, `storage_mb`, `nfe`) is told here; of others it is counted.
    """

    name: Name
    lora: Path | None = None
    loras: str | None = Field(None, description="path with {effect} in it")
    images: Path | None = None
    accelerate: Path | None = None
    ask: Literal["instruction", "student_prompt"] = "instruction"
    route: bool = False
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=1)
    num_loras: int | None = Field(None, ge=0)
    storage_mb: float | None = Field(None, ge=0)
    nfe: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_way(self) -> BenchMethod:
        if sum(way is not None for way in (self.lora, self.loras, self.images)) != 1:
            raise ValueError("give exactly one of lora, loras and images")
        if self.loras is not None and "{effect}" not in self.loras:
            raise ValueError("loras: must have {effect} in it, which stands for the effect's name")
        making = (self.steps, self.guidance, self.accelerate)
        if self.images is not None and (self.route or any(given is not None for given in making)):
            raise ValueError("steps, guidance, accelerate, route: methods made elsewhere have none; leave them out")
        if self.images is None and any(told is not None for told in (self.num_loras, self.storage_mb, self.nfe)):
            raise ValueError("num_loras, storage_mb and nfe are counted where pictures are made; leave them out")
        if self.route and self.loras is None:
            raise ValueError("route: picks one of `loras`; give them, or leave it out")
        return self


class JudgeSettings(_Section):
    """The endpoint, limits and how much is asked twice; prices are of a million tokens."""

    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    timeout_seconds: float = Field(60.0, gt=0)
    max_attempts: int = Field(5, ge=1, le=20)
    concurrency: int = Field(4, ge=1, le=64)
    max_calls: int | None = Field(None, ge=0)
    max_cost: float | None = Field(None, ge=0)
    prompt_price: float = Field(0.0, ge=0)
    answer_price: float = Field(0.0, ge=0)
    repeat_share: float = Field(0.05, ge=0, le=1)
    controls: int = Field(1, ge=0, description="control pictures of each effect")
    seed: int = 0

    @model_validator(mode="after")
    def _priced(self) -> JudgeSettings:
        if self.max_cost is not None and not self.prompt_price + self.answer_price:
            raise ValueError("max_cost: nothing costs anything without prompt_price and answer_price; give them")
        return self

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(
            "judge.url", self.url, self.model, self.api_key_env, self.timeout_seconds, self.max_attempts,
            "check it, then run again: what was answered is kept",
        )  # fmt: skip


class RewardSettings(_Section):
    """An EditReward service (`clora.evaluate.metrics.edit_reward`)."""

    url: str
    timeout_seconds: float = Field(120.0, gt=0)
    max_attempts: int = Field(3, ge=1, le=20)


class Benchmark(_Section):
    """A benchmark's file. Paths are relative to its folder."""

    output_dir: Path
    base: str = "tiny"
    catalogue: Path | None = Field(None, description="a collection whose catalogue says what effects are asked")
    effects: list[BenchEffect] = Field(min_length=1)
    images: dict[Name, Path | list[Path]] = Field(min_length=1)
    methods: list[BenchMethod] = Field(min_length=1)
    reference: str | None = Field(None, description="the method that others are compared with; the first")
    seeds: list[int] = Field([0], min_length=1)
    batch_size: int = Field(4, ge=1)
    encoders: dict[EncoderName, str | None] = Field({}, description="a folder, or a name on the hub; null: the usual")
    flip: bool = Field(False, description="FLIP to the source (extra eval)")
    edit_reward: RewardSettings | None = None
    judge: JudgeSettings | None = None
    exact: bool = Field(False, description="verdicts by the tiny world's truth; pictures are called by scene")

    @model_validator(mode="after")
    def _names(self) -> Benchmark:
        for what, names in (("effect", [e.name for e in self.effects]), ("method", [m.name for m in self.methods])):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"two {what}s are called {', '.join(twice)}; names must differ")
        for effect in self.effects:
            if strange := set(effect.categories or ()) - set(self.images):
                raise ValueError(f"effect {effect.name}: no images are in category {', '.join(sorted(strange))}")
        if self.reference is not None and self.reference not in [method.name for method in self.methods]:
            raise ValueError(f"reference: {self.reference} is no method's name")
        if self.exact and self.judge is not None:
            raise ValueError("give a judge or exact: true, not both")
        if (unasked := [e.name for e in self.effects if e.student_prompt is None]) and any(
            method.ask == "student_prompt" for method in self.methods
        ):
            raise ValueError(f"effect {unasked[0]}: a method asks for its student_prompt; add it")
        return self


class Cell(NamedTuple):
    """One result: where it lies, and of which picture."""

    method: str
    category: str
    effect: str
    key: str
    source: Path
    seed: int
    path: Path

    @property
    def source_copy(self) -> Path:
        return self.path.with_name(f"{self.key}_SRCIMG.png")


def read_benchmark(path: Path) -> Benchmark:
    """The benchmark of a YAML file, its paths made absolute.

    Raises `InputErrors` with every fault that can be found without a model: unknown fields, a catalogue that is not
    there, pictures that are not there or cannot be read, LoRA files that are missing, encoders that cannot be had, a
    judge without criteria or templates to judge by.
    """
    try:
        bench = Benchmark.model_validate(_with_catalogue(yaml.safe_load(read_yaml(path)), path.resolve().parent))
    except ValidationError as error:
        raise InputErrors([_sentence(path, one["loc"], one["msg"]) for one in error.errors()]) from None
    bench = _absolute(bench, path.resolve().parent)
    faults: list[str] = []
    for category in bench.images:
        try:
            pictures = category_pictures(bench, category)
        except InputError as error:
            faults += error.faults
            continue
        faults += [f"images.{category}: {why}" for picture in pictures if (why := _unreadable(picture))]
    for effect in bench.effects:
        if bench.judge is not None and (effect.template is None or not effect.criteria.strip()):
            faults.append(f"effect {effect.name}: the judge needs criteria and a template; add them")
        for picture in effect.template or ():
            if why := _unreadable(picture):
                faults.append(f"effect {effect.name}: {why}")
    faults += [fault for name, model in bench.encoders.items() if (fault := encoder_fault(name, model))]
    for method in bench.methods:
        files = lora_files(bench, method)
        faults += [f"method {method.name}: {f} does not exist; correct the path" for f in files if not f.is_file()]
    raise_faults(faults)
    return bench


def lora_of(method: BenchMethod, effect: str) -> Path | None:
    """The LoRA file that a method with one for each effect has for this one; None for other methods."""
    return None if method.loras is None else Path(method.loras.replace("{effect}", effect))


def lora_files(bench: Benchmark, method: BenchMethod) -> list[Path]:
    """Every LoRA file that must be kept ready for a method to serve all effects, each once."""
    effects = [lora_of(method, effect.name) for effect in bench.effects]
    return list(dict.fromkeys(file for file in (method.lora, *effects, method.accelerate) if file is not None))


def category_pictures(bench: Benchmark, category: str) -> list[Path]:
    """The test pictures of a category, in order of name. Raises `InputError` where none is there."""
    given = bench.images[category]
    if isinstance(given, list):
        found = list(given)
    else:
        if not given.is_dir():
            raise InputError(f"images.{category}: {given} is no folder; correct the path, or list files")
        found = sorted(path for path in given.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"images.{category}: no picture is in it; add some")
    if twice := [stem for stem, count in Counter(path.stem for path in found).items() if count > 1]:
        raise InputError(f"images.{category}: two pictures are called {', '.join(sorted(twice))}; rename one")
    return found


def cells(bench: Benchmark) -> Iterator[Cell]:
    """Every result that the benchmark is about, in a fixed order: method, category, effect, picture, seed."""
    for method in bench.methods:
        root = method.images or bench.output_dir / "results" / method.name
        for category in bench.images:
            pictures = category_pictures(bench, category)
            for effect in bench.effects:
                if effect.categories is not None and category not in effect.categories:
                    continue
                for picture in pictures:
                    for seed in bench.seeds:
                        key = picture.stem if len(bench.seeds) == 1 else f"{picture.stem}_{seed}"
                        place = root / category / effect.name / f"{key}.png"
                        yield Cell(method.name, category, effect.name, key, picture, seed, place)


def missing_results(bench: Benchmark, found: Sequence[Cell]) -> list[str]:
    """A sentence for each result that is not there, cannot be read, or has another picture than ours as its source."""
    faults = []
    for cell in found:
        what = f"method {cell.method}: {cell.path}"
        if not cell.path.is_file():
            faults.append(f"{what} does not exist; make it, or leave the picture out")
        elif why := _unreadable(cell.path):
            faults.append(f"method {cell.method}: {why}")
        elif cell.source_copy.is_file() and (why := _other_source(cell)):
            faults.append(f"{what}: {why}")
    return faults


def _other_source(cell: Cell) -> str:
    """Why the copy of the source beside a result is not the benchmark's picture; "" where it is."""
    ours = load_image(cell.source)
    theirs = load_image(cell.source_copy)
    small = [image.resize((16, 16)).tobytes() for image in (ours, theirs)]
    gap = sum(abs(a - b) for a, b in zip(*small, strict=True)) / len(small[0])
    if gap > 16:  # of 255: the same picture at another size, crop or compression is well below
        return f"{cell.source_copy.name} is another picture than {cell.source}; results and sources are mixed up"
    return ""


def _unreadable(path: Path) -> str:
    if not path.is_file():
        return f"{path} does not exist; correct the path"
    try:
        load_image(path)
    except InputError as error:
        return str(error)
    return ""


def _with_catalogue(values: Any, root: Path) -> Any:
    """A file's values, with what its catalogue says of the effects put in where they do not say it themselves."""
    if not isinstance(values, dict) or not isinstance(values.get("catalogue"), str):
        return values
    known: dict[str, dict[str, str]] = {}
    for entry in read_catalogue(root / values["catalogue"]).effects:
        known[entry.name] = {"name": entry.name, "instruction": entry.student_prompt or entry.prompt}
        if entry.student_prompt:
            known[entry.name]["student_prompt"] = entry.student_prompt
    listed = values.get("effects", list(known.values()))
    if not isinstance(listed, list):
        return values
    filled = [{**known.get(str(one.get("name")), {}), **one} if isinstance(one, dict) else one for one in listed]
    return values | {"effects": filled}


def _absolute(bench: Benchmark, root: Path) -> Benchmark:
    images = {
        name: [root / path for path in given] if isinstance(given, list) else root / given
        for name, given in bench.images.items()
    }
    effects = [
        effect.model_copy(update={"template": effect.template and tuple(root / path for path in effect.template)})
        for effect in bench.effects
    ]
    methods = [
        method.model_copy(
            update={
                "lora": method.lora and root / method.lora,
                "loras": method.loras and str(root / method.loras),
                "images": method.images and root / method.images,
                "accelerate": method.accelerate and root / method.accelerate,
            }
        )
        for method in bench.methods
    ]
    encoders = {
        name: str(root / model) if model is not None and (root / model).is_dir() else model  # else a name on the hub
        for name, model in bench.encoders.items()
    }
    update = {"images": images, "effects": effects, "methods": methods, "encoders": encoders}
    return bench.model_copy(update=update | {"output_dir": root / bench.output_dir})


def _sentence(path: Path, where: tuple[int | str, ...], what: str) -> str:
    key = ".".join(map(str, where))
    return f"{path}: {f'{key}: ' if key else ''}{what.removeprefix('Value error, ')}; correct it"
