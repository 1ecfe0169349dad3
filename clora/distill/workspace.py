"""What every training job starts from: the base with its adapters, and all data encoded.

Opening a workspace takes a checked run (`clora.distill.check`), loads the base once, encodes pairs and prompts through
the cache, and frees the encoders. Nothing in here learns. Of several processes the first encodes; the others have no
encoders and read the cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from clora.backbones import COMPONENTS
from clora.backbones.base import Backbone
from clora.backbones.load import load_backbone
from clora.config import Config, base_identity
from clora.data.cache import TensorCache
from clora.data.dataset import hash_pairs
from clora.data.examples import Example, ExampleEncoder
from clora.data.pairs import Pair
from clora.distill.opened import CheckedRun, OpenBase, Workspace
from clora.errors import InputError, raise_faults
from clora.lora.adapters import Adapters
from clora.training import distributed
from clora.training.device import DTYPES, base_dtype, pick_device
from clora.training.flat_parameters import FlatParameters
from clora.training.optimizer import AdamW

# A pair, its effect (None: of the general stream) and its prompts by role.
EncodeRequest = tuple[Pair, str | None, dict[str, str]]


def open_base(config: Config, console: Console) -> OpenBase:
    """Load the base and add adapters to it; no data is read.

    Its text encoder is there to encode with; call `backbone.free_encoders()` when that is done.
    """
    backbone = _load_base(config)
    config = config.with_targets(backbone.default_targets)
    identity, cache, encoder = _encoder_of(config, backbone)
    return OpenBase(config, backbone, _add_adapters(config, backbone, console), cache, identity, encoder)


def open_workspace(run: CheckedRun, console: Console, *, keep_encoders: bool = False) -> Workspace:
    """Load the base of a checked run, encode all of its pairs and free the text encoder, unless there is more to encode
    (`keep_encoders`).

    Raises `InputErrors` with every image that cannot be decoded.
    """
    config = run.config
    for warning in run.warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False, highlight=False)
    backbone = _load_base(config)
    config = config.with_targets(backbone.default_targets)
    identity, cache, encoder = _encoder_of(config, backbone)
    requests = encode_requests(run)
    if distributed.is_main():
        cache.folder.mkdir(parents=True, exist_ok=True)  # also where nothing is to be encoded
    examples = _encode_all(encoder, requests, console) if distributed.is_main() else []
    distributed.barrier()
    _check_shared(cache.folder)
    if not distributed.is_main():
        examples = _encode_all(encoder, requests, console)
    if not keep_encoders:
        backbone.free_encoders()
    return Workspace(
        config=config,
        backbone=backbone,
        adapters=_add_adapters(config, backbone, console),
        cache=cache,
        identity=identity,
        encoder=encoder,
        prompts=run.prompts,
        effects={name: [e for e in examples if e.effect == name] for name in run.effects},
        general=[e for e in examples if e.effect is None],
        hashes={"base": identity, **_data_hashes(run)},
    )


def encode_requests(run: CheckedRun) -> list[EncodeRequest]:
    """What is encoded for a run: each pair with the texts that its roles read."""
    negative = run.config.objective.negative_prompt
    requests: list[EncodeRequest] = []
    for name, pairs in run.effects.items():
        prompt = run.prompts[name]
        texts = {"student": prompt.student_prompt, "teacher": prompt.teacher_prompt, "negative": negative}
        for pair in pairs:
            caption = _caption(run, pair, prompt.teacher_prompt)
            requests.append((pair, name, texts if caption is None else texts | {"caption": caption}))
    for pair in run.general:
        instruction = pair.prompt or ""
        requests.append((pair, None, {"student": instruction, "teacher": instruction, "negative": negative}))
    return requests


def _caption(run: CheckedRun, pair: Pair, prompt: str) -> str | None:
    """The pair's own caption where it is learned from and says something else than the effect's prompt."""
    return pair.prompt if run.captions and pair.prompt and pair.prompt != prompt else None


def _splits_base(config: Config) -> bool:
    return config.train.shard_base and distributed.world_size() > 1


def _load_base(config: Config) -> Backbone:
    """The base without adapters; of several processes only the first gets the encoders, which are large."""
    device = pick_device()
    dtype = base_dtype(config.base.dtype, device)
    backbone = load_backbone(
        config.base.model,
        device,
        dtype,
        COMPONENTS if distributed.is_main() else ("transformer",),
        config.base.revision,
        transformer_device="cpu" if _splits_base(config) else None,
        quantize=config.base.quantize,
    )
    if device.type == "cpu" and dtype == torch.bfloat16:
        # 0.7 of the fused kernel's time, forward and backward (bench.training.tiny_step).
        backbone.use_plain_attention()
    return backbone


def _encoder_of(config: Config, backbone: Backbone) -> tuple[str, TensorCache, ExampleEncoder]:
    identity = base_identity(config.base.model, config.base.revision)
    cache = TensorCache(config.output_dir / "cache")
    return identity, cache, ExampleEncoder(backbone, cache, identity, config.train.buckets)


def _add_adapters(config: Config, backbone: Backbone, console: Console) -> Adapters:
    """Slots on the student's targets, kernels and recomputation as `train` says, and the base split where it is to be.

    A split base goes to the GPUs here, once the encoders have left them.
    """
    adapters = backbone.add_adapters(config.student.targets)
    backbone.use_kernels(config.train.kernels)
    backbone.set_gradient_checkpointing(config.train.gradient_checkpointing)
    if _splits_base(config):
        offload = config.train.offload_base
        whole, kept = distributed.shard(backbone.transformer, backbone.blocks, offload)
        adapters.device = backbone.device
        console.print(
            f"base of {whole / 1e6:.1f} MB split: {kept / 1e6:.1f} MB in each of {distributed.world_size()} processes"
            f"{', in CPU memory' if offload else ''}"
        )
    return adapters


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


def _data_hashes(run: CheckedRun) -> dict[str, str]:
    hashes: dict[str, str] = {}
    for name, pairs in run.effects.items():
        # A caption counts where it is learned from, and only there.
        prompt = run.prompts[name].teacher_prompt
        used = [replace(pair, prompt=_caption(run, pair, prompt)) for pair in pairs]
        hashes |= {f"pairs of {name}": hash_pairs(used)} if used else {}
    return hashes | ({"general data": hash_pairs(run.general)} if run.general else {})


def _encode_all(encoder: ExampleEncoder, requests: Sequence[EncodeRequest], console: Console) -> list[Example]:
    examples: list[Example] = []
    faults: list[str] = []
    for pair, effect, texts in track(requests, "encoding", console=console, transient=True):
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
    per_slot: bool = False,
    gradients_of: AdamW | None = None,
    coarse_updates: int = 0,
) -> AdamW:
    """AdamW, as `train` says, on the stacks' parameters `STACK.MODULE.A`; with `ema` the average is kept too.

    `per_slot`: every slot is clipped by its own norm. `gradients_of`: takes turns with this one in its buffer.
    `coarse_updates`: the first ones, by `train.coarse_optimizer`.
    """
    train = config.train
    flat = FlatParameters(
        {f"{stack}.{name}": value for stack in stacks for name, value in adapters.named_parameters(stack).items()},
        dtype=adapters.dtype,
        gradients=None if gradients_of is None else gradients_of.flat.gradients,
    )
    return AdamW(
        flat,
        learning_rate=learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        ema_decay=train.ema_decay if ema else 0.0,
        ema_start=train.ema_start,
        per_slot=per_slot,
        moments=DTYPES[train.adam_moments],
        coarse_updates=coarse_updates,
        muon=train.coarse_optimizer == "muon",
    )
