"""The schema of a configuration file, and what a whole one is asked. `clora.config.load` loads files into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import PrivateAttr
from pydantic import field_validator as field_check
from pydantic import model_validator as section_check

from clora.config.fingerprint import digest_of, felt_values, relative_values
from clora.config.sections import (
    BaseConfig,
    EffectConfig,
    EvalConfig,
    ExtendConfig,
    GeneralConfig,
    LoraConfig,
    ObjectiveConfig,
    PromptsConfig,
    ScheduleConfig,
    Section,
    TargetsConfig,
    TeachConfig,
    TrainConfig,
    doc,
)
from clora.config.types import Job, Preset, UserPath, repeats

PRESETS = ("clora", "paper", "authors", "tiny", "segment_mean", "same_step", "imitation_dmd")


class Config(Section):
    """Everything a run is told. `folder` is where the file lies that relative paths started from."""

    preset: Annotated[Preset, doc("Left out: 'tiny' on the tiny base, otherwise 'clora'.", numerics=False)] = "clora"
    base: Annotated[BaseConfig, doc("The frozen base model.")] = BaseConfig()
    output_dir: Annotated[UserPath, doc("Folder for checkpoints, teachers and collection.safetensors.", numerics=False)]
    seed: Annotated[int, doc("Every random draw follows from this and the step.", ge=0, lt=2**63)] = 0
    data_roots: Annotated[list[UserPath], doc("Folders data files may point into besides theirs.", numerics=False)] = []
    effects: Annotated[list[EffectConfig], doc("The effects, or a YAML or JSONL file of them.")] = []
    general: Annotated[GeneralConfig | None, doc("General data; null without that stream.")] = None
    student: Annotated[LoraConfig, doc("The student's adapter.")] = LoraConfig()
    teach: Annotated[TeachConfig, doc("Training of teachers.")] = TeachConfig()
    targets: Annotated[TargetsConfig, doc("Making of target images.")] = TargetsConfig()
    objective: Annotated[ObjectiveConfig, doc("The losses.")] = ObjectiveConfig()
    schedule: Annotated[ScheduleConfig, doc("The few-step schedule.")] = ScheduleConfig()
    train: Annotated[TrainConfig, doc("The training run.")] = TrainConfig()
    extend: Annotated[ExtendConfig, doc("Effects added to a collection.")] = ExtendConfig()
    eval: Annotated[EvalConfig, doc("The evaluation.", numerics=False)] = EvalConfig()
    prompts: Annotated[PromptsConfig, doc("Triggers and student prompts.", numerics=False)] = PromptsConfig()
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @field_check("base", mode="before")
    @classmethod
    def _plain_base(cls, base: Any) -> Any:
        return {"model": base} if isinstance(base, str) else base

    @section_check(mode="after")
    def _fits_together(self) -> Config:
        # Names become file names, and not every file system tells upper from lower case.
        faults = repeats("name", (effect.name for effect in self.effects))
        faults += repeats("trigger", (effect.trigger for effect in self.effects if effect.trigger))
        if self.train.shard_base and self.base.quantize != "none":
            faults.append("'train.shard_base': a quantized base cannot be split; leave it out, or base.quantize")
        objective = self.objective
        if not self.train.critic_updates and (objective.dmd_ts_weight or objective.dmd_bs_weight):
            what = "'train.critic_updates': 0 leaves distribution matching without a critic"
            faults.append(f"{what}; raise it, or set objective.dmd_ts_weight=0 and objective.dmd_bs_weight=0")
        if not self.train.critic_updates and self.train.critic_reuse:
            faults.append("'train.critic_reuse': there is no critic; leave it out, or raise train.critic_updates")
        if objective.imitation_weight and objective.imitation == "same_step" and self.student.acceleration is None:
            what = "'objective.imitation': same_step imitates teachers with an acceleration LoRA"
            faults.append(f"{what}; set student.acceleration, or objective.imitation=segment_mean")
        faults += self._steps_without_targets() + self._steps_without_imitation()
        if self.train.offload_base and not self.train.shard_base:
            faults.append("'train.offload_base': is for a base that is split; set train.shard_base=true too")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _sigmas(self) -> dict[int, list[float]]:
        """The noise levels of every number of steps that is trained for."""
        shift = self.schedule.shift
        counts = dict.fromkeys(self.schedule.trained_counts)
        return {n: [shift * k / (n + (shift - 1) * k) for k in range(n, 0, -1)] for n in counts}

    def _steps_without_targets(self) -> list[str]:
        """A sentence for each number of steps none of which target simulation may start from."""
        objective = self.objective
        if not (self.effects and objective.dmd_ts_weight and objective.ts_sigma == "schedule"):
            return []
        least = objective.imitation_below or 0.0
        bounds = f" and none below objective.imitation_below ({least:g})" if least else ""
        return [
            f"'schedule': in {count} step{'s' if count > 1 else ''} the last sigma is {sigmas[-1]:.3g}, and target"
            f" simulation needs one below objective.tau_max ({objective.tau_max:g}){bounds}; leave {count} out,"
            f" {'raise tau_max, ' if sigmas[-1] < 1 else ''}or set objective.ts_sigma=continuous"
            for count, sigmas in self._sigmas().items()
            if not any(least <= sigma < objective.tau_max for sigma in sigmas)
        ]

    def _steps_without_imitation(self) -> list[str]:
        """What is wrong with a bound below which steps are left to imitation."""
        objective = self.objective
        if (below := objective.imitation_below) is None:
            return []
        what = f"'objective.imitation_below': steps below {below:g} learn by imitation"
        if not objective.imitation_weight:
            return [f"{what}, whose weight is 0; set objective.imitation_weight, or leave it out"]
        if all(sigmas[-1] >= below for sigmas in self._sigmas().values()):
            return [f"{what}, and no trained number of steps has one; raise it, or leave it out"]
        if objective.ts_sigma == "continuous" and below >= objective.tau_max:
            return [f"{what}, which leaves target simulation none; set it below objective.tau_max"]
        return []

    @property
    def folder(self) -> Path:
        """Folder of the configuration file (the working folder for a configuration made in code)."""
        return self._folder

    def with_values(self, **changes: Any) -> Config:
        """The same with other values, checked as a whole like a file's. `train={"batch_size": 2}` changes one key of a
        section; a value that is no mapping takes its key's place."""
        values = self.model_dump()
        for key, value in changes.items():
            values[key] = values[key] | dict(value) if isinstance(value, Mapping) else value
        changed = Config.model_validate(values, context={"folder": self.folder})
        changed._folder = self._folder
        return changed

    def teacher_path(self, effect: EffectConfig) -> Path:
        """The effect's LoRA file: the given one, else where `clora teach` writes it."""
        return effect.lora or self.output_dir / "teachers" / f"{effect.name}.safetensors"

    def with_targets(self, targets: Sequence[str]) -> Config:
        """The same with `student.targets` written out: these, the base's own, where it is null. What opens a base does
        this, so that records and fingerprints name the linears, whoever named them."""
        if self.student.targets is not None:
            return self
        return self.model_copy(update={"student": self.student.model_copy(update={"targets": [*targets]})})

    def fingerprint(self, job: Job = "train", processes: int = 1) -> str:
        """SHA-256 (hex) of `deciding_values`, to compare a checkpoint with a run."""
        return digest_of(self.deciding_values(job, processes))

    def deciding_values(self, job: Job = "train", processes: int = 1) -> dict[str, Any]:
        """What decides the numbers of a job's step, as plain values by section.

        The batch sizes that the job reads count over all `processes`: two with half the batch each are one with the
        whole. `train` does not depend on how its teachers were taught; their files are compared instead. Left out are
        the fields marked `numerics=False` (where results go, how often they are written, when to stop), the job's
        `max_train_steps` where its learning rate does not depend on it, and the file's own folder.
        """
        teaches = job in ("teach", "joint")
        values = felt_values(self)
        values["trigger_scheme"] = self.prompts.trigger_scheme
        for section, key in (("train", "batch_size"), ("train", "anchor_batch_size"), ("teach", "batch_size")):
            size = values[section].pop(key)
            if (section == "teach") == (job == "teach"):
                values[section][key] = size and size * processes
        for section, read in (("teach", teaches), ("extend", job == "extend")):
            if not read:
                del values[section]
        constant = (self.teach if teaches else self.train).lr_scheduler == "constant"
        for section in ("train", "teach", "extend"):
            if section in values and (constant or (teaches and section == "train")):
                del values[section]["max_train_steps"]
        return relative_values(values, self.folder)
