"""What every training job starts from: the base with its adapters, and all data encoded.

Opening a workspace loads the base once, encodes pairs and prompts through the cache, and frees the encoders that are
no longer needed. Nothing in here learns. Of several processes the first encodes; the others have no encoders and read
the cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from clora.backbones.base import COMPONENTS, Backbone
from clora.backbones.load import load_backbone
from clora.config import Config, base_identity, general_data
from clora.data.cache import TensorCache
from clora.data.dataset import effect_pairs, hash_pairs
from clora.data.examples import Example, ExampleEncoder
from clora.data.pairs import Pair, read_pairs
from clora.errors import InputError, raise_faults
from clora.lora.adapters import Adapters
from clora.method.prompts import EffectPrompt, effect_prompts
from clora.training import distributed
from clora.training.device import DTYPES, base_dtype, pick_device
from clora.training.optimizer import Group


@dataclass
class Workspace:
    """The open base and the encoded data. `effects` keeps the configuration's order."""

    config: Config
    backbone: Backbone
    adapters: Adapters
    cache: TensorCache
    identity: str
    encoder: ExampleEncoder
    prompts: dict[str, EffectPrompt]
    effects: dict[str, list[Example]]
    general: list[Example]
    hashes: dict[str, str]  # sha256 of the base and of each dataset


def open_workspace(
    config: Config,
    console: Console,
    *,
    general: bool = True,
    keep_encoders: bool = False,
    max_pairs: int | None = None,
) -> Workspace:
    """Load the base, read and encode the effects' pairs (the first `max_pairs` of each) and, with `general`, the
    general stream's.

    With `keep_encoders` the text encoder stays, to encode more; call `backbone.free_encoders()` afterwards.

    Raises `InputErrors` with every fault of the data.
    """
    device = pick_device()
    dtype = base_dtype(config.base.dtype, device)
    shards = config.train.shard_base and distributed.world_size() > 1
    backbone = load_backbone(
        config.base.model,
        device,
        dtype,
        COMPONENTS if distributed.is_main() else ("transformer",),
        config.base.revision,
        transformer_device="cpu" if shards else None,
        quantize=config.base.quantize,
    )
    if device.type == "cpu" and dtype == torch.bfloat16:
        # 0.7 of the fused kernel's time, forward and backward (bench.training.tiny_step).
        backbone.use_plain_attention()
    identity = base_identity(config.base.model, config.base.revision)
    cache = TensorCache(config.output_dir / "cache")
    encoder = ExampleEncoder(backbone, cache, identity, config.train.buckets)
    prompts = {prompt.name: prompt for prompt in effect_prompts(config)} if config.effects else {}
    jobs = _effect_jobs(config, prompts, max_pairs)
    if general:
        jobs += _general_jobs(config)
    if distributed.is_main():
        cache.folder.mkdir(parents=True, exist_ok=True)  # also where nothing is to be encoded
    examples = _encode_all(encoder, jobs, console) if distributed.is_main() else []
    distributed.barrier()
    _check_shared(cache.folder)
    if not distributed.is_main():
        examples = _encode_all(encoder, jobs, console)
    if not keep_encoders:
        backbone.free_encoders()
    config = config.with_targets(backbone.default_targets)
    adapters = backbone.add_adapters(config.student.targets)
    backbone.use_kernels(config.train.kernels)
    backbone.set_gradient_checkpointing(config.train.gradient_checkpointing)
    if shards:
        offload = config.train.offload_base
        whole, kept = distributed.shard(backbone.transformer, backbone.blocks, offload)
        adapters.device = device
        console.print(
            f"base of {whole / 1e6:.1f} MB split: {kept / 1e6:.1f} MB in each of {distributed.world_size()} processes"
            f"{', in CPU memory' if offload else ''}"
        )
    return Workspace(
        config,
        backbone,
        adapters,
        cache,
        identity,
        encoder,
        prompts,
        {effect.name: [e for e in examples if e.effect == effect.name] for effect in config.effects},
        [e for e in examples if e.effect is None],
        {"base": identity, **_data_hashes(jobs)},
    )


Job = tuple[Pair, str | None, dict[str, str]]


def _effect_jobs(config: Config, prompts: dict[str, EffectPrompt], max_pairs: int | None) -> list[Job]:
    jobs: list[Job] = []
    faults: list[str] = []
    for effect in config.effects:
        try:
            pairs = effect_pairs(config, effect)[:max_pairs]
        except InputError as error:
            faults += error.faults
            continue
        texts = {
            "student": prompts[effect.name].student_prompt,
            "teacher": effect.prompt,
            "negative": config.objective.negative_prompt,
        }
        jobs += [(pair, effect.name, texts) for pair in pairs]
    raise_faults(faults)
    return jobs


def _general_jobs(config: Config) -> list[Job]:
    path = config.general.pairs if config.general else general_data(config.base.model)
    if path is None:
        if config.objective.p_switch < 1 and config.effects:
            raise InputError(
                "general: is missing; give general.pairs (images with instructions) or set objective.p_switch=1"
            )
        return []
    pairs = read_pairs(path, config.data_roots, require_target=False)
    if missing := [pair.place for pair in pairs if not pair.prompt]:
        raise InputError(f"{path}: {len(missing)} rows have no instruction, first {missing[0]}; add it or drop them")
    negative = config.objective.negative_prompt
    return [
        (pair, None, {"student": pair.prompt or "", "teacher": pair.prompt or "", "negative": negative})
        for pair in pairs
    ]


def _check_shared(cache: Path, seconds: float = 60.0) -> None:
    """Every process must see what the first one wrote; a network file system may take its time to show it."""
    end = time.monotonic() + seconds
    while not cache.is_dir():
        if time.monotonic() > end:
            raise InputError(
                f"output_dir: process {distributed.rank()} does not see {cache}, which process 0 has written; all"
                " machines need one file system for it"
            )
        time.sleep(0.5)


def _data_hashes(jobs: Sequence[Job]) -> dict[str, str]:
    pairs: dict[str, list[Pair]] = {}
    for pair, effect, _ in jobs:
        pairs.setdefault("general data" if effect is None else f"pairs of {effect}", []).append(pair)
    return {name: hash_pairs(found) for name, found in pairs.items()}


def _encode_all(encoder: ExampleEncoder, jobs: Sequence[Job], console: Console) -> list[Example]:
    examples: list[Example] = []
    faults: list[str] = []
    for pair, effect, texts in track(jobs, "encoding", console=console, transient=True):
        try:
            examples.append(encoder.encode(pair, effect, texts))
        except InputError as error:
            faults += [fault if str(pair.source) in fault else f"{pair.place}: {fault}" for fault in error.faults]
    raise_faults(faults)
    return examples


def trainable_group(
    adapters: Adapters,
    stacks: Sequence[str],
    config: Config,
    learning_rate: float,
    ema: bool = False,
    gradients_of: Group | None = None,
) -> Group:
    """The stacks' parameters, as `STACK.MODULE.A`, with AdamW as `train` says; with `ema` the average is kept too.

    `gradients_of`: see `Group`.
    """
    train = config.train
    return Group(
        {f"{stack}.{name}": value for stack in stacks for name, value in adapters.named_parameters(stack).items()},
        learning_rate=learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        ema_decay=train.ema_decay if ema else 0.0,
        ema_start=train.ema_start,
        gradients_of=gradients_of,
        dtype=adapters.dtype,
        moments=DTYPES[train.adam_moments],
    )
