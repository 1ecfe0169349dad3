"""Bytes that a training run takes, from numbers alone.

Parameters follow from the transformer's config.json, activations from a count of what autograd keeps in one block of
diffusers' `QwenImageTransformer2DModel` under `SlotLinear`s (`saved_by_block`, exact on a CPU; tests/jobs/test_plan.py
holds peaks to 10 %). Memory is that of tensors: `RESERVED` and `FRAGMENTATION` stand for the CUDA context and the
allocator. 1 GB is 1e9 bytes.

On N processes the base, the trained adapters (in the base's dtype) and their gradients are on every GPU, what makes
them fp32 masters, Adam's moments and the average in N parts (`clora.training.optimizer`); with `train.shard_base` the
frozen base is in N parts too (FSDP2), which `train.offload_base` keeps in CPU memory. With `base.quantize` the linears
of its blocks have int8 weights, whose floats are made while it runs.

Legend: D width, H heads, r rank, T tokens of image, references and text together, e bytes of the base's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clora.lora.frozen_linear import floats_at_once

GB = 1e9
RESERVED = 1.5 * GB  # CUDA context and the libraries' workspaces
FRAGMENTATION = 0.05  # of the peak: what an allocator holds beyond its tensors
MLP = 4  # the MLPs' inner width over D

# Tensors of width D that are alive at once, per token, at the fullest moment of a forward without grad: seven that
# the block's frame holds and two of 4 D inside the MLP (image), of which the text stream's have gone.
FORWARD_IMAGE, FORWARD_TEXT = 15, 7
BACKWARD = 7  # and in a backward, beyond what the forward kept


@dataclass(frozen=True)
class ModelShapes:
    """What a transformer's configuration says of its size. `linears`: (N, K) of every linear by module name."""

    width: int
    num_heads: int
    num_layers: int
    linears: dict[str, tuple[int, int]]
    num_parameters: int
    zero_cond_t: bool = False

    @property
    def block_linears(self) -> list[tuple[int, int]]:
        """(N, K) of the linears of all blocks."""
        return [shape for name, shape in self.linears.items() if name.startswith("transformer_blocks.")]

    @property
    def block_parameters(self) -> int:
        """Parameters of one block: what FSDP2 gathers at a time."""
        heads = 4 * (self.width // self.num_heads)
        return heads + sum(N * (K + 1) for N, K in self.block_linears) // self.num_layers

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of a LoRA of this rank on the linears whose names end in a target."""
        endings = tuple(f".{target}" for target in targets)
        return rank * sum(N + K for name, (N, K) in self.linears.items() if f".{name}".endswith(endings))


def model_shapes(config: Mapping[str, Any]) -> ModelShapes:
    """The sizes in a `QwenImageTransformer2DModel`'s config.json; keys left out have diffusers' defaults."""
    heads = int(config.get("num_attention_heads", 24))
    per_head = int(config.get("attention_head_dim", 128))
    layers, D = int(config.get("num_layers", 60)), heads * per_head
    channels, text_width = int(config.get("in_channels", 64)), int(config.get("joint_attention_dim", 3584))
    out_channels = int(config.get("patch_size", 2)) ** 2 * int(config.get("out_channels", 16) or channels)
    attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    block = {"img_mod.1": (6 * D, D), "txt_mod.1": (6 * D, D)} | {f"attn.{name}": (D, D) for name in attention}
    for stream in ("img", "txt"):
        block |= {f"{stream}_mlp.net.0.proj": (MLP * D, D), f"{stream}_mlp.net.2": (D, MLP * D)}
    linears = {
        "time_text_embed.timestep_embedder.linear_1": (D, 256),
        "time_text_embed.timestep_embedder.linear_2": (D, D),
        "img_in": (D, channels),
        "txt_in": (D, text_width),
        **{f"transformer_blocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()},
        "norm_out.linear": (2 * D, D),
        "proj_out": (out_channels, D),
    }
    norms = text_width + layers * 4 * per_head
    total = norms + sum(N * (K + 1) for N, K in linears.values())
    return ModelShapes(D, heads, layers, linears, total, bool(config.get("zero_cond_t", False)))


@dataclass(frozen=True)
class TrainSettings:
    """What decides a run's memory, as numbers. Ranks of 0: there is no such adapter."""

    image_tokens: int
    reference_tokens: int
    text_tokens: int
    batch_size: int
    anchor_batch_size: int
    rank: int
    targets: tuple[str, ...]
    acceleration_rank: int = 0
    teacher_rank: int = 0
    teacher_slots: int = 0
    base_bytes: int = 2  # of one number of the base
    quantized: bool = False  # the linears of its blocks are int8
    ema: bool = True
    guided: bool = True
    terms: tuple[bool, bool, bool] = (True, True, True)  # TA-FM, DMD-TS, DMD-BS
    num_steps: int = 8
    critic_batches: int = 5  # of a step: critic updates times batches of each
    moments_bytes: int = 4  # of one number of AdamW's moments
    checkpointing: bool = True
    whole_blocks: int = 0  # of them, blocks that checkpointing leaves as they are
    targets_batch: int = 0  # samples in one forward while targets are made
    text_encoder_parameters: int = 0  # on the device until everything is encoded
    vae_parameters: int = 0
    num_gpus: int = 1
    shard_base: bool = False
    offload_base: bool = False

    @property
    def tokens(self) -> int:
        """T of one sample."""
        return self.image_tokens + self.reference_tokens + self.text_tokens


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of tensors on one GPU, by phase of a run and by what they are."""

    phases: dict[str, dict[str, int]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Most bytes of tensors at once."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def needed(self) -> float:
        """The GPU memory that the peak asks for."""
        return self.peak * (1 + FRAGMENTATION) + RESERVED


def base_weights(shapes: ModelShapes, settings: TrainSettings) -> int:
    """Bytes of the transformer's weights, undivided. A quantized linear has one a weight, and five (a scale and a zero)
    for each output."""
    if not settings.quantized:
        return shapes.num_parameters * settings.base_bytes
    inside = shapes.block_linears
    weights = sum(N * K for N, K in inside)
    return (shapes.num_parameters - weights) * settings.base_bytes + weights + 5 * sum(N for N, _ in inside)


def saved_by_block(shapes: ModelShapes, settings: TrainSettings, batch: int) -> int:
    """Bytes that autograd keeps of one block's forward over `batch` samples, adapters on the default targets.

    Per token: 9 inputs of linears and gates, q k v out of the attention, q and k before and after their norm (fp32
    and e), the MLP before and after its GELU; r numbers of each adapter; the statistics of norms and attention.
    """
    D, H, r, e = shapes.width, shapes.num_heads, settings.rank + settings.acceleration_rank, settings.base_bytes
    per_token = (9 + 4 + 2 * MLP) * D * e + 2 * D * 4 + 6 * r * e + 12 * H + 4 * e
    if e != 4:
        per_token += 2 * D * e
    saved = batch * (settings.tokens * per_token + (18 * D + 2 * r) * e)
    if shapes.zero_cond_t:  # scales and gates of their own for every image token, and the masks that chose them
        saved += batch * (settings.image_tokens + settings.reference_tokens) * (4 * D * e + 6)
    return saved


def saved_by_forward(shapes: ModelShapes, settings: TrainSettings, batch: int) -> int:
    """Bytes that a forward with grad keeps until its backward: all blocks', or with checkpointing `whole_blocks` and of
    the others the inputs and the attention's result."""
    width = batch * shapes.width * settings.base_bytes
    head = width * (settings.image_tokens + settings.reference_tokens)
    whole = min(settings.whole_blocks, shapes.num_layers) if settings.checkpointing else shapes.num_layers
    again = 2 * width * settings.tokens + _attention_statistics(shapes, settings, batch)
    return whole * saved_by_block(shapes, settings, batch) + (shapes.num_layers - whole) * again + head


def _attention_statistics(shapes: ModelShapes, settings: TrainSettings, batch: int) -> int:
    return 4 * batch * settings.tokens * shapes.num_heads


def forward_workspace(shapes: ModelShapes, settings: TrainSettings, batch: int) -> int:
    """Most bytes alive in a forward without grad, beyond its inputs."""
    image = settings.image_tokens + settings.reference_tokens
    per_sample = FORWARD_IMAGE * image + FORWARD_TEXT * settings.text_tokens
    return batch * per_sample * shapes.width * settings.base_bytes + _made_whole(shapes, settings)


def backward_workspace(shapes: ModelShapes, settings: TrainSettings, batch: int) -> int:
    """Most bytes of a backward beyond what its forward kept; with checkpointing one block is run again."""
    width = batch * settings.tokens * shapes.width * settings.base_bytes
    again = 0
    if settings.checkpointing and settings.whole_blocks < shapes.num_layers:
        # The block's own input and its attention are kept already.
        again = saved_by_block(shapes, settings, batch) - 2 * width - _attention_statistics(shapes, settings, batch)
    return BACKWARD * width + again + _made_whole(shapes, settings)


def memory_plan(shapes: ModelShapes, settings: TrainSettings) -> MemoryPlan:
    """Bytes on each GPU of a distillation (`clora.distill.step.Distiller.full_step`), by phase."""
    s, e = settings, settings.base_bytes
    student, critic = trained_parameters(shapes, s)
    base = base_weights(shapes, s)
    # Of an offloaded base what lies outside the blocks stays from a forward on.
    outside = (shapes.num_parameters - shapes.num_layers * shapes.block_parameters) * e
    kept = outside if s.offload_base else part_of(base, s.num_gpus if s.shard_base else 1)
    frozen = {"base": kept, "VAE": s.vae_parameters * e}
    frozen["teacher slots"] = s.teacher_slots * shapes.adapter_parameters(s.teacher_rank, s.targets) * e
    resident = frozen | {
        "student and critic": e * (student + critic) + part_of((4 - e) * (student + critic), s.num_gpus),
        "AdamW": part_of(2 * s.moments_bytes * (student + critic), s.num_gpus),
        "EMA": part_of(4 * student, s.num_gpus) if s.ema else 0,
        # One buffer that stays for both; of several processes each has its part of the sums besides.
        "gradients": 4 * student + (part_of(4 * (student + critic), s.num_gpus) if s.num_gpus > 1 else 0),
    }
    critic_update = {
        "kept for backward": saved_by_forward(shapes, s, s.batch_size),
        "workspace": backward_workspace(shapes, s, s.batch_size),
    }
    together = s.critic_batches if s.shard_base else 1  # many tokens share a forward only where the base is in parts
    rollouts = {"workspace": forward_workspace(shapes, s, together * s.batch_size)}
    # Each process sends a copy of its part, which comes back whole.
    optimizer = {"workspace": part_of(e * student, s.num_gpus) if s.num_gpus > 1 else 0}
    # On the first GPU; a base that is to be cut waits in CPU memory meanwhile.
    encoding = {"base": 0 if s.shard_base else base, "VAE": frozen["VAE"]}
    encoding["text encoder"] = s.text_encoder_parameters * e
    targets = frozen | {"workspace": forward_workspace(shapes, s, s.targets_batch)}
    return MemoryPlan(
        {
            "encoding": encoding,
            "targets": targets,
            "rollouts": resident | rollouts,
            "critic update": resident | critic_update,
            "student update": resident | _student_update(shapes, s),
            "optimizer step": resident | optimizer,
        }
    )


def _student_update(shapes: ModelShapes, settings: TrainSettings) -> dict[str, int]:
    """The fullest moment of a student update: each term's graph is walked before the next is built."""
    s = settings
    moments = []
    for term, (on, batch) in enumerate(zip(s.terms, (s.anchor_batch_size, s.batch_size, s.batch_size), strict=True)):
        kept = saved_by_forward(shapes, s, batch)
        # Distribution matching asks the teacher while its own graph waits.
        teacher = forward_workspace(shapes, s, batch * (2 if s.guided else 1)) if term else 0
        if on:
            workspace = max(backward_workspace(shapes, s, batch), teacher)
            moments.append({"kept for backward": kept, "workspace": workspace})
    return max(moments, key=lambda parts: sum(parts.values()))


def choose_whole_blocks(shapes: ModelShapes, settings: TrainSettings, memory: float) -> int:
    """The most blocks that checkpointing may leave whole within this memory (bytes); 0 where not even none fits."""
    for count in range(shapes.num_layers, 0, -1):
        if memory_plan(shapes, replace(settings, checkpointing=True, whole_blocks=count)).needed <= memory:
            return count
    return 0


def trained_parameters(shapes: ModelShapes, settings: TrainSettings) -> tuple[int, int]:
    """Trained parameters of the student (with the acceleration LoRA that joins it) and of the critic."""
    rank, targets = settings.rank, settings.targets
    student = shapes.adapter_parameters(rank + settings.acceleration_rank, targets)
    return student, shapes.adapter_parameters(rank, targets)


def part_of(count: int, parts: int) -> int:
    """`count` divided by `parts`, rounded up."""
    return -(-count // parts)


def _made_whole(shapes: ModelShapes, settings: TrainSettings) -> int:
    """Weights in the form that is computed with, where they are kept in another: the block in use and the one fetched
    ahead of a base in parts, some of the largest linear's floats of a quantized one."""
    if settings.shard_base:
        return 2 * shapes.block_parameters * settings.base_bytes
    largest = max(N * K for N, K in shapes.block_linears)
    return min(largest, floats_at_once("cuda")) * settings.base_bytes if settings.quantized else 0
