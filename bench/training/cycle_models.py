"""What `bench.training.train_cycle` measures: sizes, data, and both schedules on the same random transformer."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers import QwenImageTransformer2DModel
from transformers import Qwen2Config, Qwen2Model

from bench.training.authors_schedule import AuthorsSchedule, draw_critic, draw_generator
from clora.backbones.qwen_image.backbone import QwenImageBackbone
from clora.backbones.qwen_image.footprint import transformer_footprint
from clora.backbones.qwen_image.sizes import ImageSizes
from clora.config import Config, Quantize, build_config
from clora.data.examples import Example
from clora.distill.batches import Batches
from clora.distill.memory import TrainSettings, budget, choose_num_blocks_kept, device_memory
from clora.distill.networks import Models
from clora.distill.roles import CRITIC, STUDENT
from clora.distill.step import Distillation
from clora.distill.workspace import trainable_group
from clora.lora.bank import TeacherBank
from clora.lora.files import write_lora
from clora.lora.frozen_linear import quantize_linears
from clora.lora.layers import QWEN_IMAGE_TARGETS
from clora.lora.module import LoraModule
from clora.method.routing import Stream, step_generator
from clora.tiny.recipe.train_base import TRANSFORMER_CONFIG

EFFECTS = ("first", "second")
CHANNELS = 64
Lora = dict[str, LoraModule]


@dataclass(frozen=True)
class Size:
    """A transformer (diffusers' settings), and the data that goes through it: one reference of the result's grid."""

    transformer: dict[str, Any]
    grid: tuple[int, int]
    text_tokens: int
    rank: int
    dtype: torch.dtype
    rounds: int
    encoder_layers: int = 0  # of the text encoder that the authors' schedule runs anew; 0 leaves it out
    rehearsals: int | None = None  # cycles of each stream that are counted; None: until every exit step was drawn
    authors_fit: bool = True  # on the machine this size is for
    memory_budget_gb: float | None = None  # of ours; None takes what the machine has
    quantize: Quantize = "none"  # ours alone, as the next
    adam_moments: Literal["float32", "bfloat16"] = "float32"

    @property
    def sequence(self) -> int:
        """Tokens of the result, the reference and the text."""
        return 2 * self.grid[0] * self.grid[1] + self.text_tokens

    @property
    def text_width(self) -> int:
        return int(self.transformer.get("joint_attention_dim", 3584))

    @property
    def width(self) -> int:
        heads, per_head = (self.transformer.get(f"{name}", n) for name, n in _HEADS.items())
        return int(heads * per_head)


_HEADS = {"num_attention_heads": 24, "attention_head_dim": 128}
# Settings of ours for little memory.
LEAN: dict[str, Any] = {"quantize": "int8", "adam_moments": "bfloat16"}
SIZES = {
    "small": Size({**TRANSFORMER_CONFIG, "num_layers": 1}, (4, 4), 8, 4, torch.float32, rounds=2, rehearsals=3),
    "tiny": Size(TRANSFORMER_CONFIG, (8, 8), 24, 32, torch.float32, rounds=5),
    "full-width-2": Size({"num_layers": 2}, (4, 4), 16, 128, torch.bfloat16, rounds=2),
    "full-width-4": Size({"num_layers": 4}, (64, 64), 512, 128, torch.bfloat16, rounds=3, encoder_layers=2),
    # 1024 x 1024 pixels, as above. The real encoder has 28 layers beside the transformer's 60, hence 9 beside 20.
    "full-width-20": Size({"num_layers": 20}, (64, 64), 512, 128, torch.bfloat16, rounds=5, encoder_layers=9),
    # Three copies and their adapters take more than the 141 GB of an H200.
    "full-width-60": Size(
        {"num_layers": 60}, (64, 64), 512, 128, torch.bfloat16, rounds=3, authors_fit=False, memory_budget_gb=125
    ),
}


# One narrow layer, for what does not depend on the transformer: batches, random numbers and counts.
_NARROW: dict[str, Any] = {
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
}


def narrow(size: Size) -> Size:
    """The same data through one narrow layer."""
    return replace(size, transformer={**size.transformer, **_NARROW}, rank=2, encoder_layers=0)


def random_transformer(size: Size, device: str) -> Any:
    """The transformer with the stock start, frozen, made in its own dtype and place: never a second copy of it."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            transformer = QwenImageTransformer2DModel(**size.transformer).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    if device == "cpu" and size.dtype == torch.bfloat16:  # as a training job on a CPU sets it
        as_backbone(transformer).use_plain_attention()
    return transformer


def as_backbone(transformer: Any) -> QwenImageBackbone:
    """A backbone of this transformer alone."""
    pipeline = SimpleNamespace(transformer=transformer)
    return QwenImageBackbone("random", pipeline, ImageSizes(), transformer.device, transformer.dtype)


def random_lora(size: Size, targets: tuple[str, ...], seed: int, dtype: torch.dtype) -> Lora:
    """A LoRA on every target, of alpha = rank, in CPU memory."""
    rng = torch.Generator().manual_seed(seed)
    modules = {}
    for name, linear in random_transformer(size, "meta").named_modules():
        if isinstance(linear, torch.nn.Linear) and f".{name}".endswith(tuple(f".{target}" for target in targets)):
            A = torch.empty(size.rank, linear.in_features).uniform_(-1, 1, generator=rng) * linear.in_features**-0.5
            B = torch.empty(linear.out_features, size.rank).uniform_(-1, 1, generator=rng) * 0.02
            modules[name] = LoraModule(A.to(dtype), B.to(dtype), float(size.rank))
    return modules


def random_examples(size: Size) -> tuple[dict[str, list[Example]], list[Example]]:
    """Two examples of each effect and two of the general stream, as the caches would hand them over."""
    rng = torch.Generator().manual_seed(1)
    tokens = size.grid[0] * size.grid[1]

    def example(effect: str | None, number: int) -> Example:
        texts = {
            role: torch.randn(size.text_tokens, size.text_width, generator=rng).to(size.dtype)
            for role in ("student", "teacher", "negative")
        }
        reference, y = (torch.randn(tokens, CHANNELS, generator=rng).to(size.dtype) for _ in range(2))
        targets = () if effect is None else (y,)
        key = (effect, str(number))
        return Example(effect, (Path("random.png"),), size.grid, (reference,), (size.grid,), texts, y=targets, key=key)

    return {name: [example(name, 0), example(name, 1)] for name in EFFECTS}, [example(None, 0), example(None, 1)]


@dataclass
class Data:
    """What both schedules are given. It lies in CPU memory and is made before either of them."""

    size: Size
    config: Config
    effects: dict[str, list[Example]]
    general: list[Example]
    student: Lora  # where student and critic start
    teachers: dict[str, Lora]


def make_data(size: Size, critic_updates: int) -> Data:
    config = build_config(
        {
            "preset": "authors",
            "base": "tiny",  # a name that is always there; the transformer is given by hand
            "output_dir": "unused",
            "student": {"rank": size.rank, "alpha": size.rank},
            # One adapter in the teachers' place on the device, as theirs has.
            "train": {
                "critic_updates": critic_updates,
                "teacher_slots": 1,
                "adam_moments": size.adam_moments,
                "memory_budget_gb": size.memory_budget_gb,
            },
        }
    ).with_targets(QWEN_IMAGE_TARGETS)
    targets = QWEN_IMAGE_TARGETS
    effects, general = random_examples(size)
    student = random_lora(size, targets, 2, torch.float32)
    teachers = {name: random_lora(size, targets, 3 + i, size.dtype) for i, name in enumerate(EFFECTS)}
    return Data(size, config, effects, general, student, teachers)


def make_ours(data: Data, device: str) -> Distillation:
    """clora's own step on a random transformer."""
    transformer = random_transformer(data.size, device)
    if data.size.quantize == "int8":
        quantize_linears(transformer.transformer_blocks, device)
    return make_distillation(data, as_backbone(transformer))


def make_distillation(data: Data, backbone: QwenImageBackbone) -> Distillation:
    """clora's own step: one base, three adapters on it."""
    size, config = data.size, data.config
    adapters = backbone.add_adapters(config.student.targets)
    backbone.use_kernels(config.train.kernels)
    footprint = transformer_footprint(size.transformer, {})
    whole = choose_num_blocks_kept(footprint, plan_settings(data), budget(config, device_memory()))
    backbone.set_gradient_checkpointing(config.train.gradient_checkpointing, whole)
    bank = TeacherBank(adapters, teacher_files(data.teachers), config.train.teacher_slots, dtype=size.dtype)
    for slot in (STUDENT, CRITIC):
        adapters.add_stack(slot, [slot], size.rank, size.rank, trainable=True)
        adapters.init_slot(slot, data.student)
    student = trainable_group(adapters, [STUDENT], config, config.train.learning_rate, ema=True)
    critic = trainable_group(adapters, [CRITIC], config, config.train.critic_learning_rate, gradients_of=student)
    batches = Batches(config, data.effects, data.general, backbone.device, backbone.token_channels)
    return Distillation(config, batches, Models(backbone, bank), student, critic)


def teacher_files(teachers: dict[str, Lora]) -> dict[str, Path]:
    """The teachers as files, which last as long as this process: a bank reads nothing else."""
    folder = Path(tempfile.mkdtemp(prefix="clora-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    files = {name: folder / f"{name}.safetensors" for name in teachers}
    for name, path in files.items():
        write_lora(path, teachers[name], dtype=None)
    return files


def plan_settings(data: Data) -> TrainSettings:
    """What `clora.distill.memory` asks of these sizes."""
    size, train = data.size, data.config.train
    return TrainSettings(
        image_tokens=size.grid[0] * size.grid[1],
        reference_tokens=size.grid[0] * size.grid[1],
        text_tokens=size.text_tokens,
        batch_size=train.batch_size,
        anchor_batch_size=train.anchor_batch_size or train.batch_size,
        rank=size.rank,
        targets=QWEN_IMAGE_TARGETS,
        teacher_rank=size.rank,
        teacher_slots=train.teacher_slots,
        base_bytes=size.dtype.itemsize,
        checkpointing=train.gradient_checkpointing,
    )


def make_source(size: Size, critic_updates: int, device: str) -> Distillation:
    """Its `batches` are those of `size`: they do not depend on the transformer, so a narrow one serves."""
    return make_ours(make_data(narrow(size), critic_updates), device)


def make_authors(data: Data, device: str) -> AuthorsSchedule:
    return AuthorsSchedule(
        random_transformer(data.size, device),
        data.student,
        data.student,
        data.teachers,
        QWEN_IMAGE_TARGETS,
        encode=make_encoder(data.size, device) if data.size.encoder_layers else None,
        checkpointing=data.config.train.gradient_checkpointing,
    )


def make_encoder(size: Size, device: str) -> Callable[[int], None]:
    """The work of encoding n prompts with the language half of Qwen2.5-VL 7B; what it says is dropped."""
    config = Qwen2Config(
        hidden_size=size.text_width,
        intermediate_size=18944,
        num_hidden_layers=size.encoder_layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=1,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            encoder = Qwen2Model(config).eval().requires_grad_(False)
            embeddings = torch.randn(1, size.text_tokens, size.text_width)
    finally:
        torch.set_default_dtype(before)

    def encode(prompts: int) -> None:
        for _ in range(prompts):
            with torch.no_grad():
                encoder(inputs_embeds=embeddings)

    return encode


def authors_cycle(authors: AuthorsSchedule, source: Batches, step: int) -> Callable[[], None]:
    """Their cycle on the samples that `source` deals at `step`; batches and random numbers are made beforehand."""
    stream, updates = source.stream(step), source.config.train.critic_updates
    critics = [source.draw(step, stream, "critic", k, updates)[0] for k in range(updates)]
    batch, _ = source.draw(step, stream, "student")
    rng = step_generator(source.config.seed, step, "authors", source.device)
    shape = (batch.batch_size, *batch.latent_shape)
    critic_draws = [draw_critic(shape, rng) for _ in critics]
    draws = draw_generator(shape, rng)

    def run() -> None:
        for critic_batch, critic_draw in zip(critics, critic_draws, strict=True):
            authors.critic_update(critic_batch, critic_draw)
        authors.generator_update(batch, draws)

    return run


def steps_of(source: Batches, stream: Stream) -> Iterator[int]:
    """The steps that are of one stream."""
    return (step for step in count() if source.stream(step) == stream)
