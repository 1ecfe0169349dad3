"""What every training job starts from: the base with its adapters, and all data encoded.

Opening a workspace loads the base once, encodes pairs and prompts through the cache, and frees the encoders that are
no longer needed. Nothing in here learns. Of several processes the first encodes; the others have no encoders and read
the cache.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from clora.backbones.qwen_image.backbone import QwenImageBackbone, load_backbone
from clora.backbones.qwen_image.pipeline import COMPONENTS
from clora.config import Config, EffectConfig, acceleration_lora, general_data, resolve_base
from clora.data.cache import TensorCache
from clora.data.examples import Example, ExampleEncoder
from clora.data.pairs import Pair, read_pairs
from clora.errors import InputError, InputErrors, raise_faults
from clora.lora.adapters import Adapters
from clora.lora.files import LoraModule
from clora.method.prompts import EffectPrompt, effect_prompts
from clora.training import distributed
from clora.training.optimizer import Group
from clora.training.run_record import hash_pairs

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Workspace:
    """The open base and the encoded data. `effects` keeps the configuration's order."""

    config: Config
    backbone: QwenImageBackbone
    adapters: Adapters
    cache: TensorCache
    identity: str
    encoder: ExampleEncoder
    prompts: dict[str, EffectPrompt]
    effects: dict[str, list[Example]]
    general: list[Example]
    hashes: dict[str, str]  # sha256 of the base and of each dataset


def quiet_console() -> Console:
    """Progress on stderr, of the first process alone."""
    return Console(stderr=True, quiet=not distributed.is_main())


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, every operation gives the same bits each time or raises; nothing changes when not `wanted`."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's linear algebra is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def pick_device() -> torch.device:
    """The GPU where there is one (this process's, under torchrun), else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def base_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type behind `base.dtype`; "auto" is bfloat16 on a GPU and on a CPU with AVX512-BF16, else float32."""
    if name != "auto":
        return DTYPES[name]
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


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
    shards = config.train.shard_base and distributed.world() > 1
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
    distributed.meet()
    _check_shared(cache.folder)
    if not distributed.is_main():
        examples = _encode_all(encoder, jobs, console)
    if not keep_encoders:
        backbone.free_encoders()
    adapters = backbone.add_adapters(config.student.targets)
    backbone.use_kernels(config.train.kernels)
    backbone.set_gradient_checkpointing(config.train.gradient_checkpointing)
    if shards:
        offload = config.train.offload_base
        whole, kept = distributed.shard(backbone.transformer, list(backbone.transformer.transformer_blocks), offload)
        adapters.device = device
        console.print(
            f"base of {whole / 1e6:.1f} MB split: {kept / 1e6:.1f} MB in each of {distributed.world()} processes"
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
        except InputErrors as errors:
            faults += errors.faults
            continue
        except InputError as error:
            faults.append(str(error))
            continue
        texts = {
            "student": prompts[effect.name].student_prompt,
            "teacher": effect.prompt,
            "negative": config.objective.negative_prompt,
        }
        jobs += [(pair, effect.name, texts) for pair in pairs]
    raise_faults(faults)
    return jobs


def effect_pairs(config: Config, effect: EffectConfig) -> list[Pair]:
    """The pairs of one effect. An effect with its own LoRA needs no targets."""
    if effect.pairs is None:
        raise InputError(f"effect {effect.name}: has no pairs; give 'pairs', a folder or metadata file")
    return read_pairs(effect.pairs, config.data_roots, require_target=effect.lora is None, effect=effect.name)


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
        except InputErrors as errors:
            faults += errors.faults
        except InputError as error:
            faults.append(f"{pair.place}: {error}" if str(pair.source) not in str(error) else str(error))
    raise_faults(faults)
    return examples


def base_identity(base: str, revision: str | None) -> str:
    """A hash that changes with the base's models: names, sizes, configurations and the heads of weight files.

    General data and LoRAs that the base brings along (weight files outside its parts' folders) change nothing.
    """
    resolved = resolve_base(base)
    if not isinstance(resolved, Path):
        return f"{resolved}@{revision or 'main'}"
    digest = hashlib.sha256()
    models = (p for p in resolved.rglob("*") if p.is_file() and "general" not in p.parts)
    for path in sorted(p for p in models if p.parent != resolved or p.suffix != ".safetensors"):
        digest.update(f"{path.relative_to(resolved)} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def acceleration_of(config: Config) -> Path | None:
    """The acceleration LoRA that joins the student, as `student.acceleration` says; none without effects."""
    named = config.student.acceleration
    if named is None or not config.effects:
        return None
    path = acceleration_lora(config.base.model) if named == "base" else named
    if path is None:
        raise InputError(
            f"student.acceleration: base {config.base.model} brings no acceleration LoRA; give a file, or null"
        )
    return path


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


@contextmanager
def averaged_weights(group: Group) -> Iterator[None]:
    """Put what a group exports, in fp32, in place of its parameters for a while (files, sample grids). All processes
    must enter it; nothing can be trained inside."""
    kept = {name: value.data for name, value in group.parameters.items()}
    for name, value in group.averaged().items():
        group.parameters[name].data = value
    try:
        yield
    finally:
        for name, value in kept.items():
            group.parameters[name].data = value


def slot_to_cpu(adapters: Adapters, slot: str) -> dict[str, LoraModule]:
    """A slot's modules as CPU tensors, ready to be written."""
    return {
        name: LoraModule(m.A.detach().cpu(), m.B.detach().cpu(), m.alpha)
        for name, m in adapters.slot_modules(slot).items()
    }


def in_batches(items: Sequence[Example], size: int) -> Iterable[list[Example]]:
    """Consecutive batches of examples that share their sizes."""
    groups: dict[object, list[Example]] = {}
    for item in items:
        groups.setdefault(item.sizes, []).append(item)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
