"""The paper's Table 2 on the tiny base: `python -m bench.serving.deployment [--requests 100] [--effects 10 20 50]`.

The same requests, one after the other, each a picture with a few words of what its effect is about:
`router_and_swaps`: a router chooses one of N LoRAs by the words, diffusers' hotswap loads it where it is not the last
one's, the picture is sampled. `collection`: one file, the request names its effect (as a button in an app does), the
engine of `clora serve` samples; `collection_at_once`: the same with eight requests at a time. Both encode and decode.

Routing accuracy is the share of requests whose own effect was chosen. The router compares character trigrams of the
words with the prompts of the N effects, and the words are the prompts' own: no model, hardly any time and no mistake,
where the paper's is a vision model of seconds a query that errs in 1 to 24 % of them. So latency and accuracy of
routing are the best that the baseline could have. What a swap costs is real, what is in the LoRAs is not (random, rank
16): pictures are not judged here. Switches and accuracy count the two queries that warm up as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from bench.serving.networks import RANK, Request, swapping, write_effect_loras
from clora.backbones.cond import make_cond
from clora.backbones.load import load_backbone
from clora.config import collection_lora
from clora.evaluate.router import route
from clora.export.verify import picture
from clora.inference.sampling import few_step_sampling
from clora.io.atomic import write_text
from clora.lora.catalogue import CatalogueEntry, read_catalogue
from clora.serve.engine import Work
from clora.serve.load import open_models
from clora.serve.settings import Settings
from clora.serve.threads import ThreadEngine

KEPT = 0.4  # of the words of an effect's description
AT_ONCE = 8


@dataclass(frozen=True)
class Query:
    """What somebody asks for: a picture, some words, and the effect that was meant."""

    image: Image.Image
    words: str
    effect: CatalogueEntry
    seed: int


def make_queries(effects: Sequence[CatalogueEntry], count: int, seed: int) -> list[Query]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        effect = rng.choice(effects)
        words = effect.student_prompt.split()
        kept = sorted(rng.sample(range(len(words)), max(1, round(KEPT * len(words)))))
        found.append(Query(picture(number % 8), " ".join(words[i] for i in kept), effect, number))
    return found


class RouterAndSwaps:
    """One LoRA an effect, as a team without a collection serves them."""

    def __init__(self, base: str, effects: Sequence[CatalogueEntry], folder: Path) -> None:
        catalogue = read_catalogue(_collection(base))
        schedule = catalogue.schedule
        sampling = few_step_sampling(schedule.num_steps, schedule.shift, catalogue.sampler)
        self.files = write_effect_loras(base, [effect.name for effect in effects], folder)
        self.effects = {effect.name: effect for effect in effects}
        self.descriptions = {name: effect.student_prompt for name, effect in self.effects.items()}
        self.swapping = swapping(base, self.files, True, sampling)
        self.encoders = load_backbone(base, "cpu", torch.float32, ("vae", "text_encoder"))
        self.routing, self.loading, self.right, self.switches = list[float](), list[float](), 0, 0

    @torch.no_grad()
    def __call__(self, query: Query) -> None:
        started = time.perf_counter()
        chosen = self.effects[route(query.words, self.descriptions)]
        self.routing.append(time.perf_counter() - started)
        self.right += chosen == query.effect
        backbone = self.encoders
        texts = backbone.encode_prompts([chosen.prompt], [[query.image]])
        references = backbone.encode_references([query.image])
        cond = make_cond(texts, [references], backbone.grid(backbone.output_size(query.image)))
        if self.swapping.loaded != chosen.name:
            started = time.perf_counter()
            self.swapping.load(chosen.name)
            self.loading.append(time.perf_counter() - started)
            self.switches += 1
        x0_BTC = self.swapping(Request(chosen.name, cond, query.seed))
        backbone.to_pil(backbone.decode(x0_BTC, cond.grid))


def seconds_each(run: Any, queries: Sequence[Query]) -> list[float]:
    """The seconds of each query."""
    found = []
    for query in queries:
        started = time.perf_counter()
        run(query)
        found.append(time.perf_counter() - started)
    return found


def times(seconds: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50_ms": round(cuts[49] * 1e3, 1), "p99_ms": round(cuts[98] * 1e3, 1)}


def measure_swaps(base: str, effects: Sequence[CatalogueEntry], queries: Sequence[Query]) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        arm = RouterAndSwaps(base, effects, Path(folder))
        seconds_each(arm, queries[:2])  # warms up
        arm.routing, arm.loading, arm.right, arm.switches = [], [], 0, 0
        seconds = seconds_each(arm, queries)
        stored = sum(path.stat().st_size for path in arm.files.values())
    return {
        "routing_ms": round(statistics.median(arm.routing) * 1e3, 2),
        "loading_ms": round(statistics.median(arm.loading) * 1e3, 2),
        "switches": arm.switches,
        "loading_in_all_s": round(sum(arm.loading), 2),
        "routing_accuracy": round(arm.right / len(arm.routing), 3),
        "stored_bytes": stored,
        **times(seconds),
        "requests_per_s": round(len(seconds) / sum(seconds), 2),
    }


def measure_collection(base: str, queries: Sequence[Query]) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = Settings(base=base, device="cpu", dtype="float32")
    engine = ThreadEngine(open_models(settings), settings)

    async def edit(query: Query) -> None:
        work = Work("clora", (query.image,), query.effect.prompt, None, (query.seed,), query.effect.name, 600)
        await engine.edit(work, lambda: None)

    async def at_once() -> float:
        started, room = time.perf_counter(), asyncio.Semaphore(AT_ONCE)

        async def one(query: Query) -> None:
            async with room:
                await edit(query)

        await asyncio.gather(*map(one, queries))
        return len(queries) / (time.perf_counter() - started)

    alone = partial(seconds_each, lambda query: asyncio.run(edit(query)))
    alone(queries[:2])  # warms up
    seconds = alone(queries)
    rate = asyncio.run(at_once())
    engine.close()
    fixed = {"routing_ms": 0, "loading_ms": 0, "switches": 0, "loading_in_all_s": 0, "routing_accuracy": 1.0}
    fixed |= {"stored_bytes": _collection(base).stat().st_size}
    one = fixed | times(seconds) | {"requests_per_s": round(len(seconds) / sum(seconds), 2)}
    return one, {"requests_per_s": round(rate, 2)}


def _collection(base: str) -> Path:
    found = collection_lora(base)
    assert found is not None, f"{base} brings no collection"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--effects", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, in one line")
    parser.add_argument("--out", type=Path, help="file for the JSON document as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    catalogue = read_catalogue(_collection(options.base))
    rows = []
    for number in options.effects:
        effects = catalogue.effects[:number]
        queries = make_queries(effects, options.requests, options.seed)
        alone, together = measure_collection(options.base, queries)
        swaps = measure_swaps(options.base, effects, queries)
        rows.append({"effects": number, "router_and_swaps": swaps, "collection": alone, "collection_at_once": together})
    document = {"bench": "deployment", "torch": torch.__version__, "base": options.base, "requests": options.requests}
    document |= {"rank_of_single_loras": RANK, "seed": options.seed, "rows": rows}
    if options.out is not None:
        write_text(options.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
