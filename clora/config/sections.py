"""The sections of a configuration file: one pydantic model each. `clora.config.schema` puts them together.

The defaults are those of the preset `clora`, whose file explains them; a test holds the two together.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo
from pydantic import field_validator as field_check
from pydantic import model_validator as section_check

from clora.config.types import (
    Acceleration,
    CoarseOptimizer,
    CoarseTarget,
    Count,
    Decay,
    DmdNorm,
    EffectName,
    Guidance,
    Imitation,
    Kernels,
    LrScheduler,
    Natural,
    NonNegative,
    Positive,
    Quantize,
    Rank,
    Rescale,
    Sampler,
    SaveDtype,
    Share,
    StepCounts,
    Suffixes,
    TaFmSigma,
    TargetSource,
    Text,
    Tracker,
    TsSigma,
    Url,
    UserPath,
    beside_the_file,
)


def doc(description: str, *, numerics: bool = True, **limits: Any) -> Any:
    """What a field means, and limits that no type above states. `numerics` False: no number of a job depends on the
    field, so that a checkpoint stays valid when it changes (`Config.deciding_values`)."""
    return Field(description=description, json_schema_extra=None if numerics else {"numerics": False}, **limits)


class Section(BaseModel):
    """A frozen section that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_strip_whitespace=False)


class BaseConfig(Section):
    """The frozen model under every adapter. A plain string `base: NAME` means `base: {model: NAME}`."""

    model: Annotated[Text, doc("'tiny', a hub id such as OWNER/NAME, or a folder.")] = "tiny"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        doc("Type the frozen weights are held in; auto takes bfloat16 where the device has arithmetic for it."),
    ] = "bfloat16"
    quantize: Annotated[
        Quantize, doc("Weights of the transformer blocks' linears: 'int8' halves their memory (needs torchao).")
    ] = "none"
    revision: Annotated[str | None, doc("Commit, branch or tag of a hub id; null takes the newest.")] = None

    @field_check("model")
    @classmethod
    def _folder_or_hub_id(cls, model: str, info: ValidationInfo) -> str:
        folder = Path((info.context or {}).get("folder", "."))
        if model != "tiny" and (model.startswith((".", "/", "~")) or os.path.isdir(folder / model)):
            return str(beside_the_file(Path(model), info))
        return model


class EffectConfig(Section):
    """One effect: its teacher (a LoRA file, or pairs to teach one from) and its prompts."""

    name: Annotated[EffectName, doc("Unique name, also a file name: letters, digits, _ . -")]
    lora: Annotated[UserPath | None, doc("Teacher LoRA (.safetensors); null: `clora teach` makes it.")] = None
    prompt: Annotated[Text, doc("Teacher prompt, the one its LoRA was trained with.")]
    student_prompt: Annotated[Text | None, doc("What the student reads; null: AOP writes it.")] = None
    trigger: Annotated[Text | None, doc("Trigger before the student prompt; null: made.")] = None
    pairs: Annotated[UserPath | None, doc("Folder or metadata file of source (and target) images.")] = None
    criteria: Annotated[Text | None, doc("What a good result shows, for judges and prompts.")] = None

    @field_check("prompt", "student_prompt", "trigger", "criteria")
    @classmethod
    def _not_blank(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("is blank; write the text or leave the key out")
        return text


class GeneralConfig(Section):
    """Unlabelled images with instructions, for the stream that keeps the base's general skill (PDSR)."""

    pairs: Annotated[UserPath, doc("Folder or metadata file of images and instructions; no targets needed.")]


class LoraConfig(Section):
    """The adapter that is trained: `student` (and the critic, which has the same shape)."""

    rank: Annotated[Rank, doc("Rank of the update.")] = 128
    alpha: Annotated[Positive, doc("The update is scaled by alpha / rank.")] = 128
    targets: Annotated[Suffixes | None, doc("Module-name suffixes it covers; null: the base's own list.")] = None
    init_from: Annotated[UserPath | None, doc("LoRA file to start from; null: a fresh adapter.")] = None
    acceleration: Annotated[
        Acceleration, doc("Few-step LoRA joined to the student after the coarse steps; 'base': the base's own.")
    ] = None


class TeachConfig(Section):
    """`clora teach`: a teacher LoRA per effect that has pairs and no LoRA (Eq. 2)."""

    max_train_steps: Annotated[Count, doc("Optimizer steps.")] = 2000
    batch_size: Annotated[Count, doc("Samples per effect per step.")] = 1
    learning_rate: Annotated[Positive, doc("Peak learning rate of AdamW.")] = 1e-4
    rank: Annotated[Rank, doc("Rank of a teacher.")] = 16
    alpha: Annotated[Positive, doc("The teacher's update is scaled by alpha / rank.")] = 16
    lr_scheduler: Annotated[LrScheduler, doc("Shape of the learning rate after the warm-up.")] = "constant"
    lr_warmup_steps: Annotated[Natural, doc("Steps over which the learning rate rises from zero.")] = 50
    sigma_shift: Annotated[Positive, doc("Shift of the uniform noise level; 1 = none, > 1 = noisier.")] = 3.0
    caption_dropout: Annotated[Decay, doc("Share of samples taught with an empty prompt.")] = 0.05
    save_dtype: Annotated[SaveDtype, doc("Type in the written file.", numerics=False)] = "bfloat16"


class TargetsConfig(Section):
    """The target images y of Eq. 6 and 7."""

    source: Annotated[TargetSource, doc("'teachers' make them; 'pairs': the pairs' own target images.")] = "teachers"
    acceleration: Annotated[
        Acceleration,
        doc("Few-step LoRA on top of each teacher: they are then made as the student samples; 'base': the base's own."),
    ] = None
    num_steps: Annotated[Count, doc("Euler steps of the teacher.")] = 40
    guidance: Annotated[Guidance, doc("Classifier-free guidance scale; 1 = none.")] = 4.0
    guidance_rescale: Annotated[Rescale, doc("'norm': as the base's own pipeline rescales it; 'none'.")] = "norm"
    shift: Annotated[Positive | None, doc("Shift of its noise levels; null: the base's own scheduler's.")] = None
    per_source: Annotated[Count, doc("Target images per source image, each from its own noise.")] = 1
    max_sources: Annotated[
        Count | None, doc("Pairs per effect that `clora train` takes; null: all. `teach` takes all.")
    ] = None


class ObjectiveConfig(Section):
    """The losses of Eq. 1, 6, 7, 8 and 9. Every sigma is a noise level in [0, 1]: 1 is noise."""

    p_switch: Annotated[Share, doc("Probability that a step is of the effect stream (PDSR).")] = 0.5
    tau_max: Annotated[Share, doc("Target simulation starts below this sigma (Eq. 7).")] = 1.0
    tau_min: Annotated[Decay, doc("Its critic looks above this sigma (Eq. 7).")] = 0.02
    ts_sigma: Annotated[TsSigma, doc("Where it starts: any such sigma, or the schedule's.")] = "schedule"
    ts_critic_shift: Annotated[Positive, doc("Shift of that critic's sigma, drawn above tau_min.")] = 1.0
    dmd_sigma_min: Annotated[Decay, doc("Least sigma at which DMD_BS compares the scores.")] = 0.02
    dmd_sigma_max: Annotated[Share, doc("Greatest sigma at which DMD_BS compares the scores.")] = 0.98
    dmd_sigma_shift: Annotated[Positive, doc("Shift of that sigma.")] = 3.0
    guidance: Annotated[Guidance, doc("Real score: uncond + guidance (cond - uncond); 1 = none.")] = 4.0
    guidance_rescale: Annotated[Rescale, doc("'norm': each guided token gets the norm of cond.")] = "norm"
    negative_prompt: Annotated[str, doc("Prompt of the unconditional branch.")] = " "
    ta_fm_weight: Annotated[NonNegative, doc("Weight of TA-FM (Eq. 6).")] = 0.1
    imitation: Annotated[
        Imitation,
        doc("'segment_mean': of the teacher over the student's step; 'same_step': teacher + acceleration LoRA."),
    ] = "segment_mean"
    imitation_weight: Annotated[NonNegative, doc("Weight of that; it needs no critic.")] = 0.0
    on_policy_share: Annotated[Share, doc("Share of its batches that start from the student's own rollout.")] = 0.0
    imitation_below: Annotated[
        Share | None,
        doc("Sampler steps below this sigma learn by it, effects alone, the others by DMD; null: all steps by both."),
    ] = None
    dmd_ts_weight: Annotated[NonNegative, doc("Weight of target-simulated DMD (Eq. 7).")] = 1.0
    dmd_bs_weight: Annotated[NonNegative, doc("Weight of backward-simulated DMD (Eq. 1).")] = 1.0
    ta_fm_sigma: Annotated[TaFmSigma, doc("Sigma of TA-FM: see the presets `clora`, `authors`.")] = "shifted"
    dmd_norm: Annotated[DmdNorm, doc("'sample': divide by its mean |x0_student - x0_real|.")] = "sample"
    dmd_norm_floor: Annotated[Positive, doc("Least value of that divisor.")] = 1e-3
    critic_sigma_shift: Annotated[Positive, doc("Shift of the uniform sigma the critic is trained at.")] = 3.0
    critic_target_share: Annotated[Share, doc("Share of its effect samples from target simulation.")] = 0.5
    aop: Annotated[bool, doc("Student reads trigger + own prompt (Eq. 5); false: the teacher's.")] = True

    @section_check(mode="after")
    def _ordered(self) -> ObjectiveConfig:
        for name in ("dmd_sigma_min", "tau_min"):
            if (least := getattr(self, name)) >= self.dmd_sigma_max:
                raise ValueError(f"{name} ({least}) must be below dmd_sigma_max ({self.dmd_sigma_max})")
        return self

    def imitates(self, stream: str) -> bool:
        """Whether a stream, "effect" or "general", learns by imitation. With `imitation_below` effects alone do: the
        general stream's states are the student's own rollouts, and so far from the base's that their loss would
        outweigh everything else."""
        return self.imitation_weight > 0 and (stream == "effect" or self.imitation_below is None)


class ScheduleConfig(Section):
    """The few-step schedule: sigma_k = shift u / (1 + (shift - 1) u) for u = 1, 1 - 1/n, ... 1/n."""

    num_steps: Annotated[int, doc("Steps of the student.", ge=1, le=1000)] = 8
    step_counts: Annotated[
        StepCounts | None,
        doc("Step counts trained for besides `num_steps`: one of all is drawn for a batch, a repeated one more often."),
    ] = [4, 2]
    shift: Annotated[Positive, doc("Shift of the schedule toward noise; 1 = evenly spaced.")] = 3.0
    sampler: Annotated[Sampler, doc("'consistency': noise afresh at each step; 'euler': follow the velocity.")] = (
        "consistency"
    )

    @property
    def trained_counts(self) -> list[int]:
        """`num_steps`, then `step_counts`: each is drawn as often as it is here."""
        return [self.num_steps, *(self.step_counts or ())]


class BucketConfig(Section):
    """Sizes of training images: for each aspect ratio the largest size within max_area."""

    max_area: Annotated[Count, doc("Pixels at most, width times height.")] = 1024 * 1024
    multiple: Annotated[Count, doc("Width and height are multiples of this many pixels.")] = 32
    # Pairs, because YAML reads 16:9 without quotes as the number 969.
    aspect_ratios: Annotated[list[tuple[Count, Count]], doc("Pairs [width, height].", min_length=1)] = [
        (1, 1), (3, 4), (4, 3), (2, 3), (3, 2), (9, 16), (16, 9)
    ]  # fmt: skip


class TrainConfig(Section):
    """`clora train`. Names follow diffusers' trainers."""

    max_train_steps: Annotated[Count, doc("Student updates in all, the coarse ones included.")] = 5000
    coarse_steps: Annotated[Natural, doc("First updates without a critic, before the full objective.")] = 500
    coarse_target: Annotated[
        CoarseTarget,
        doc("What they learn: the teachers' 'images' (TA-FM), or the teachers' 'velocity' on the way to them."),
    ] = "velocity"
    max_train_seconds: Annotated[Positive | None, doc("Save and stop after this; null = no limit.", numerics=False)] = (
        None
    )
    critic_updates: Annotated[Natural, doc("Critic updates per student update; 0: no critic, no DMD.")] = 5
    critic_reuse: Annotated[bool, doc("The critic's last update of a step learns from the student's samples.")] = False
    batch_size: Annotated[Count, doc("Samples per process and update.")] = 1
    anchor_batch_size: Annotated[
        Count | None, doc("Samples of TA-FM, of the coarse stage and of imitation; null = those of DMD.")
    ] = None
    gradient_accumulation_steps: Annotated[Count, doc("Batches per update.")] = 1
    learning_rate: Annotated[Positive, doc("Peak learning rate of the student in the full stage.")] = 1e-4
    coarse_learning_rate: Annotated[Positive | None, doc("And in the coarse one; null = the same.")] = None
    coarse_optimizer: Annotated[CoarseOptimizer, doc("Of the coarse stage; Muon wants a rate of its own.")] = "adamw"
    critic_learning_rate: Annotated[Positive, doc("Peak learning rate of the critic.")] = 1e-4
    adam_beta1: Annotated[Decay, doc("Decay of AdamW's first moment.")] = 0.9
    adam_beta2: Annotated[Decay, doc("Decay of AdamW's second moment.")] = 0.999
    adam_weight_decay: Annotated[NonNegative, doc("Weight decay of AdamW, and of Muon.")] = 0.01
    adam_epsilon: Annotated[Positive, doc("Epsilon of AdamW.")] = 1e-8
    adam_moments: Annotated[
        Literal["float32", "bfloat16"], doc("Type in which AdamW's moments are kept; bfloat16 halves them.")
    ] = "float32"
    max_grad_norm: Annotated[Positive, doc("Gradients are clipped to this norm.")] = 1.0
    lr_scheduler: Annotated[LrScheduler, doc("Shape of the learning rates after the warm-up.")] = "constant"
    lr_warmup_steps: Annotated[Natural, doc("Updates over which the learning rates rise from zero.")] = 100
    ema_decay: Annotated[Decay, doc("Decay of the student's average, which is exported; 0 = off.")] = 0.999
    ema_start: Annotated[Natural, doc("Update at which the average starts.")] = 500
    gradient_checkpointing: Annotated[
        bool, doc("Recompute the activations that memory has no room for.", numerics=False)
    ] = True
    memory_budget_gb: Annotated[
        Positive | None,
        doc("Memory of a process, 1e9 bytes; null: its GPU's, or what is free without one.", numerics=False),
    ] = None
    kernels: Annotated[
        Kernels, doc("Transformer blocks: 'fused' on clora's ops, 'reference' as in diffusers; auto fuses on a GPU.")
    ] = "auto"
    checkpointing_steps: Annotated[Count, doc("Updates between checkpoints.", numerics=False)] = 500
    checkpoints_total_limit: Annotated[
        Count | None, doc("Newest checkpoints kept; null keeps all.", numerics=False)
    ] = 3
    report_to: Annotated[Tracker, doc("Where the figures go besides the log.", numerics=False)] = "none"
    sample_steps: Annotated[Natural, doc("Updates between sample grids; 0 = never.", numerics=False)] = 500
    log_every: Annotated[Count, doc("Updates between lines of the log.", numerics=False)] = 10
    teacher_slots: Annotated[Count, doc("Teacher adapters held on the device at once.", numerics=False)] = 4
    teacher_cache_gb: Annotated[
        NonNegative | None,
        doc("CPU memory of a process for teachers it has read, 1e9 bytes; null: all of them.", numerics=False),
    ] = 10.0
    shard_base: Annotated[
        bool, doc("Split the base over the processes (FSDP2), for one that does not fit.", numerics=False)
    ] = False
    offload_base: Annotated[
        bool, doc("Keep a split base in CPU memory, on the GPU a block at a time; slower.", numerics=False)
    ] = False
    deterministic: Annotated[
        bool, doc("Only operations that give the same bits each time; slower.", numerics=False)
    ] = False
    timeout_seconds: Annotated[Positive, doc("Longest wait for the other processes within a step.", numerics=False)] = (
        600.0
    )
    buckets: Annotated[BucketConfig, doc("Sizes of training images.")] = BucketConfig()


class ExtendConfig(Section):
    """`clora extend`: effects for an existing collection (Table 5), in place of the keys of these names in `train`,
    `student` and `objective`."""

    rank: Annotated[Rank, doc("Rank of what is added to the collection's LoRA.")] = 32
    max_train_steps: Annotated[Count, doc("Student updates in all, the coarse ones included.")] = 100
    coarse_steps: Annotated[Natural, doc("First updates with TA-FM alone.")] = 50
    learning_rate: Annotated[Positive, doc("Peak learning rate of the student in the full stage.")] = 1e-4
    coarse_learning_rate: Annotated[Positive | None, doc("And in the coarse one; null = the same.")] = None
    coarse_optimizer: Annotated[CoarseOptimizer, doc("Of the coarse stage.")] = "adamw"
    lr_warmup_steps: Annotated[Natural, doc("Updates over which the learning rates rise from zero.")] = 10
    anchor_batch_size: Annotated[Count | None, doc("Samples of TA-FM; null = those of DMD.")] = None
    p_switch: Annotated[Share | None, doc("As `objective.p_switch`; null = that one.")] = None
    ta_fm_weight: Annotated[
        NonNegative, doc("As `objective.ta_fm_weight`; what stands in TA-FM's place keeps to few-step teachers.")
    ] = 1.0
    rehearsal_share: Annotated[Decay, doc("Share of the effects' samples that rehearse old effects.")] = 0.5
    rehearsal_weight: Annotated[Positive, doc("Weight of their TA-FM, which keeps to the old velocity.")] = 5.0
    rehearsal_sources: Annotated[Count, doc("Images that each old effect is rehearsed on.")] = 8


class EvalConfig(Section):
    """`clora eval`."""

    num_samples: Annotated[Count, doc("Source images per effect.")] = 16
    seeds: Annotated[list[int], doc("Noise seeds; each source is edited once per seed.", min_length=1)] = [0]
    num_steps: Annotated[StepCounts | None, doc("Step counts compared; null: the collection's own.")] = None
    batch_size: Annotated[Count, doc("Images sampled at once.")] = 1


class PromptsConfig(Section):
    """`clora prompts`: how triggers are made and who rewrites the prompts (AOP)."""

    trigger_scheme: Annotated[Literal["random", "rare"], doc("'<name_XXXXXX>' or two rare words.")] = "random"
    endpoint: Annotated[Url | None, doc("OpenAI-compatible address ending in /v1; null: offline.")] = None
    model: Annotated[Text, doc("Vision model asked for there.")] = "qwen-vl-max-latest"
    api_key_env: Annotated[Text, doc("Environment variable that holds the key.")] = "OPENAI_API_KEY"
    timeout_seconds: Annotated[Positive, doc("Time allowed for one answer.")] = 60.0
    max_attempts: Annotated[Count, doc("Tries per effect: overload, time-outs, bad answers.", le=20)] = 5
    min_chars: Annotated[Count, doc("A shorter answer is bad.")] = 20
    max_chars: Annotated[Count, doc("A longer answer is bad.")] = 1200
