"""Loading of configuration files: presets, precedence, faults, paths, fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from clora.config import (
    PRESETS,
    Config,
    EffectConfig,
    ObjectiveConfig,
    Section,
    TrainConfig,
    acceleration_of,
    build_config,
    known_keys,
    load_config,
    load_preset,
)
from clora.config.fingerprint import felt_values
from clora.config.types import Job
from clora.errors import InputError, InputErrors
from clora.lora.layers import QWEN_IMAGE_TARGETS

SECTIONS = ("student", "teach", "targets", "objective", "schedule", "train", "extend", "eval", "prompts")
MINIMAL = "output_dir: out\nbase: Qwen/Qwen-Image-Edit-2509\n"


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    error = caught.value
    return error.faults if isinstance(error, InputErrors) else [str(error)]


def leaves(values: Any, prefix: str = "") -> set[str]:
    if not isinstance(values, dict):
        return {prefix}
    return {leaf for key, value in values.items() for leaf in leaves(value, f"{prefix}.{key}".strip("."))}


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    return [model, *(found for inner in model.__subclasses__() for found in sections(inner))]


# ---- presets and defaults ----


@pytest.mark.parametrize("name", PRESETS)
def test_preset_writes_out_every_field_and_no_other(name: str) -> None:
    parents = {key.rpartition(".")[0] for key in known_keys()}
    schema = {key for key in known_keys() if key.split(".")[0] in SECTIONS and key not in parents}
    # What the base is, is the user's choice; how it is held is the preset's.
    assert leaves(load_preset(name)) == schema | {"base.dtype", "base.quantize"}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_loads(name: str, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), [f"preset={name}"])
    assert config.preset == name
    assert config.model_dump()["train"]["learning_rate"] == load_preset(name)["train"]["learning_rate"]


def test_code_defaults_are_the_clora_preset(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, MINIMAL), ["preset=clora"])
    built = Config(output_dir=Path("out"))
    for section in SECTIONS:
        assert getattr(built, section) == getattr(loaded, section), section


def test_every_field_has_a_description() -> None:
    missing = [
        f"{model.__name__}.{name}"
        for model in sections(Section)
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert missing == []


def test_paper_preset_has_the_published_figures(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["preset=paper"])
    objective, train = config.objective, config.train
    assert (objective.p_switch, objective.tau_max, objective.tau_min) == (0.5, 0.75, 0.5)
    assert (train.learning_rate, train.critic_learning_rate) == (1e-4, 1e-4)
    assert (train.critic_updates, train.max_train_steps, config.teach.max_train_steps) == (5, 5000, 2000)
    assert (objective.ta_fm_weight, objective.dmd_ts_weight, objective.dmd_bs_weight) == (1, 1, 1)
    assert (config.targets.num_steps, config.schedule.num_steps, objective.aop) == (40, 8, True)
    assert (train.coarse_steps, train.ema_decay, objective.critic_target_share) == (0, 0, 0)


def test_authors_preset_has_the_figures_of_their_code(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["preset=authors"])
    objective, schedule = config.objective, config.schedule
    # Their cond + 4 (cond - uncond) is uncond + 5 (cond - uncond).
    assert (objective.guidance, objective.negative_prompt, objective.guidance_rescale) == (5.0, "", "none")
    us = [1 - k / schedule.num_steps for k in range(schedule.num_steps)]
    sigmas = [schedule.shift * u / (1 + (schedule.shift - 1) * u) for u in us]
    # Target simulation takes the last five of their eight steps.
    assert objective.ts_sigma == "schedule"
    assert [s for s in sigmas if s < objective.tau_max] == pytest.approx([5 / 6, 0.75, 9 / 14, 0.5, 0.3])
    lowest = objective.ts_critic_shift * objective.tau_min
    lowest /= 1 + (objective.ts_critic_shift - 1) * objective.tau_min
    assert lowest == pytest.approx(0.75)
    assert (objective.ta_fm_sigma, config.student.rank, config.student.alpha) == ("above_dmd", 128, 128)
    assert (config.train.max_grad_norm, config.train.adam_beta1, config.train.adam_beta2) == (10, 0.9, 0.999)


def test_preset_left_out_follows_the_base(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "output_dir: o\n")).preset == "tiny"
    assert load_config(write(tmp_path, "output_dir: o\nbase: tiny\n")).train.buckets.max_area == 64 * 64
    assert load_config(write(tmp_path, MINIMAL)).preset == "clora"
    assert load_config(write(tmp_path, MINIMAL), ["base=tiny"]).preset == "tiny"


# ---- precedence and short forms ----


def test_overrides_beat_the_file_and_the_file_beats_the_preset(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "preset: paper\ntrain:\n  learning_rate: 2e-4\n  batch_size: 3\n")
    config = load_config(path, ["train.batch_size=7"])
    assert config.train.max_grad_norm == 10.0  # the preset
    assert config.train.learning_rate == 2e-4  # the file
    assert config.train.batch_size == 7  # the command line


def test_the_later_of_two_overrides_wins_and_values_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_config(
        path,
        ["seed=1", "seed=2", "eval.num_steps=[4,8]", "train.max_train_seconds=null", "student.alpha=1e1"],
    )
    assert (config.seed, config.eval.num_steps, config.train.max_train_seconds) == (2, [4, 8], None)
    assert config.student.alpha == 10.0


def test_base_as_text_keeps_its_name_under_a_dotted_override(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    base = load_config(path, ["base.dtype=float32"]).base
    assert (base.model, base.dtype) == ("Qwen/Qwen-Image-Edit-2509", "float32")
    assert load_config(path, ["base=tiny", "base.dtype=float32"]).base.model == "tiny"


def test_an_empty_section_takes_the_preset(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, MINIMAL + "train:\nobjective:\n")).train.critic_updates == 5


def test_yaml_traps_are_read_as_meant(tmp_path: Path) -> None:
    text = MINIMAL + "train: {learning_rate: 3e-5}\n"
    config = load_config(write(tmp_path, text))
    assert config.train.learning_rate == 3e-5
    # An unquoted 16:9 is the number 969 to YAML.
    faults = faults_of(write(tmp_path, MINIMAL + "train: {buckets: {aspect_ratios: [16:9]}}\n"))
    assert len(faults) == 1 and "'train.buckets.aspect_ratios.0'" in faults[0] and "969" in faults[0]


def test_effects_override_by_index(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "effects:\n- {name: a, prompt: p}\n- {name: b, prompt: q}\n")
    config = load_config(path, ["effects.1.prompt=new words", "effects.0.lora=x.safetensors"])
    assert [effect.prompt for effect in config.effects] == ["p", "new words"]
    assert config.effects[0].lora == tmp_path / "x.safetensors"


@pytest.mark.parametrize("form", ["jsonl", "json", "yaml", "yaml-key"])
def test_effects_from_a_file_have_paths_from_the_main_file(tmp_path: Path, form: str) -> None:
    rows = {
        "jsonl": '{"name": "a", "prompt": "1", "lora": "l/a.safetensors"}\n\n{"name": "b", "prompt": "x"}\n',
        "json": '[{"name": "a", "prompt": "1", "lora": "l/a.safetensors"}, {"name": "b", "prompt": "x"}]',
        "yaml": "- {name: a, prompt: '1', lora: l/a.safetensors}\n- {name: b, prompt: x}\n",
        "yaml-key": "effects:\n- {name: a, prompt: '1', lora: l/a.safetensors}\n- {name: b, prompt: x}\n",
    }[form]
    name = f"lists/effects.{form.partition('-')[0]}"
    write(tmp_path, rows, name)
    config = load_config(write(tmp_path, MINIMAL + f"effects: {name}\n"))
    assert [effect.name for effect in config.effects] == ["a", "b"]
    assert config.effects[0].lora == tmp_path / "l" / "a.safetensors"


def test_relative_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "base: ./model\noutput_dir: ../out\ndata_roots: [shared, /abs]\n"
        "effects: [{name: a, prompt: p, lora: l/a.safetensors, pairs: pairs}]\n"
        "general: {pairs: g.jsonl}\nstudent: {init_from: s.safetensors, acceleration: fast.safetensors}\n"
        "targets: {acceleration: faster.safetensors}\n"
    )
    path = write(tmp_path, text, "conf/config.yaml")
    monkeypatch.chdir(tmp_path)
    for given in (path, Path("conf/config.yaml")):
        config = load_config(given)
        home = tmp_path / "conf"
        assert config.folder == home
        assert config.output_dir == tmp_path / "out"
        assert config.base.model == str(home / "model")
        assert config.data_roots == [home / "shared", Path("/abs")]
        assert (config.effects[0].lora, config.effects[0].pairs) == (home / "l/a.safetensors", home / "pairs")
        assert config.general is not None and config.general.pairs == home / "g.jsonl"
        assert config.student.init_from == home / "s.safetensors"
        assert config.student.acceleration == home / "fast.safetensors"
        assert acceleration_of(config, "targets") == home / "faster.safetensors"
        assert config.teacher_path(EffectConfig(name="b", prompt="p")) == tmp_path / "out/teachers/b.safetensors"


def test_base_that_is_a_folder_beside_the_file_is_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_config(path).base.model == "Qwen/Qwen-Image-Edit-2509"
    (tmp_path / "Qwen" / "Qwen-Image-Edit-2509").mkdir(parents=True)
    assert load_config(path).base.model == str(tmp_path / "Qwen" / "Qwen-Image-Edit-2509")


def test_build_config_equals_the_same_file(tmp_path: Path) -> None:
    text = MINIMAL + "effects: [{name: a, prompt: p, lora: a.safetensors}]\ntrain: {batch_size: 2}\n"
    assert build_config(yaml.safe_load(text), tmp_path) == load_config(write(tmp_path, text))


# ---- faults ----


def test_every_fault_is_listed_with_its_dotted_key(tmp_path: Path) -> None:
    text = (
        "base: tiny\nlearnig_rate: 3\n"
        "train: {lr: 1, batch_size: 0, max_train_steps: x}\n"
        "objective: {dmd_sigma_min: 0.99, tau_max: 750}\n"
        "effects:\n- {name: a, prompt: p, triger: t}\n- {name: on, prompt: 3}\n- {name: ../x}\nschedule: 4\n"
    )
    faults = "\n".join(faults_of(write(tmp_path, text)))
    for expected in (
        "unknown key 'learnig_rate'; did you mean 'train.learning_rate'?",
        "unknown key 'train.lr'; did you mean 'train.learning_rate'?",
        "unknown key 'effects.0.triger'; did you mean 'effects.0.trigger'?",
        "'output_dir' is missing",
        "'train.batch_size': input should be greater than or equal to 1, got 0",
        "'train.max_train_steps'",
        "'objective.tau_max': input should be less than or equal to 1, got 750",
        "'effects.1.name' must be text, got True; put it in quotes",
        "'effects.1.prompt' must be text, got 3",
        "'effects.2.name'",
        "'effects.2.prompt' is missing",
        "'schedule' must be a section of 'key: value' lines, got 4",
    ):
        assert expected in faults


@pytest.mark.parametrize("section", SECTIONS)
def test_a_mistyped_key_is_answered_with_the_right_one(tmp_path: Path, section: str) -> None:
    siblings = [key for key in known_keys() if key.rpartition(".")[0] == section]
    mistyped = {f"{key[:-2]}{key[-1]}x": key for key in siblings}
    faults = faults_of(write(tmp_path, MINIMAL), *(f"{wrong}=1" for wrong in mistyped))
    answers = [fault.partition(": ")[2] for fault in faults]
    assert answers == [f"unknown key '{wrong}'; did you mean '{key}'?" for wrong, key in mistyped.items()]
    assert len(answers) > 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("max_train_steps", "train.max_train_steps"),
        ("rank", "student.rank"),
        ("train.network_dim", "student.rank"),
        ("train.resolution", "train.buckets.max_area"),
        ("objective.guidance_scale", "objective.guidance"),
        ("train.num_inference_steps", "targets.num_steps"),
        ("model", "base"),
    ],
)
def test_a_key_of_another_section_or_trainer_is_recognised(tmp_path: Path, given: str, meant: str) -> None:
    assert faults_of(write(tmp_path, MINIMAL), f"{given}=1")[0].endswith(
        f"unknown key '{given}'; did you mean '{meant}'?"
    )


def test_a_key_like_no_other_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    fault = faults_of(write(tmp_path, MINIMAL), "schedule.qqqq=1")[0]
    assert fault.endswith("unknown key 'schedule.qqqq'; known in 'schedule': num_steps, step_counts, shift, sampler")


def test_repeated_yaml_keys_are_all_named_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ntrain:\n  batch_size: 1\n  batch_size: 2\nseed: 3\n")
    faults = faults_of(path)
    assert faults == [
        f"{path} line 4: key 'train.batch_size' repeats line 3; keep one of them",
        f"{path} line 5: key 'seed' repeats line 1; keep one of them",
    ]


def test_effects_alike_but_for_case_are_refused(tmp_path: Path) -> None:
    effects = "effects: [{name: Clay, prompt: p, trigger: x}, {name: clay, prompt: q, trigger: X}]\n"
    faults = "\n".join(faults_of(write(tmp_path, MINIMAL + effects)))
    assert "name 'clay' is used by 2 effects" in faults and "trigger 'x' is used by 2 effects" in faults


def test_ways_to_hold_the_base_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    (fault,) = faults_of(path, "train.offload_base=true")
    assert "'train.offload_base': is for a base that is split; set train.shard_base=true too" in fault
    (fault,) = faults_of(path, "train.shard_base=true", "base.quantize=int8")
    assert "'train.shard_base': a quantized base cannot be split; leave it out, or base.quantize" in fault
    assert load_config(path, ["train.shard_base=true", "train.offload_base=true"]).train.offload_base


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\n", "not valid YAML"),
        ("x: !!python/object/apply:os.system [ls]\n", "not plain data"),
        ("- 1\n- 2\n", "must hold 'key: value' lines"),
        ("a: &a [*a]\n", "contains itself"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{c}: &{c} [{','.join([f'*{p}'] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        ), "aliases expand"),
        ("[" * 1500 + "]" * 1500, "nested too deeply"),
        ("output_dir: ${nowhere}\n", "nowhere"),
        ("output_dir: ???\n", "output_dir"),
        ("output_dir: o\npreset: papr\n", "did you mean 'paper'?"),
        ("output_dir: o\neffects: e.txt\n", "not .yaml, .jsonl or .json"),
        ("output_dir: o\neffects: e.jsonl\n", "e.jsonl does not exist"),
        ("output_dir: o\ntrain: {learning_rate: .inf}\n", "'train.learning_rate'"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_a_sentence(tmp_path: Path, text: str, expected: str) -> None:
    faults = faults_of(write(tmp_path, text))
    assert len(faults) == 1 and expected in faults[0] and "\n" not in faults[0]


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in faults_of(tmp_path / "none.yaml")[0]
    assert "is a folder" in faults_of(tmp_path)[0]
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"a: \xff\xfe\n")
    assert "not UTF-8" in faults_of(binary)[0]
    binary.write_bytes(b"#" * ((4 << 20) + 1))
    assert "larger than 4 MiB" in faults_of(binary)[0]


def test_bad_overrides_are_all_listed(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    faults = faults_of(path, "seed", "=3", "train.lr=[1")
    assert len(faults) == 3
    assert "must read key=value" in faults[0] and "must read key=value" in faults[1]
    assert "train.lr" in faults[2]
    assert "'effects': input should be a valid list" in faults_of(path, "effects.5.name=x")[0]


def test_bad_lines_of_an_effects_file_are_all_listed(tmp_path: Path) -> None:
    write(tmp_path, '{"name": "a"\n[1]\n{"name": "a", "name": "b"}\n{"name": "c", "prompt": "p"}\n', "e.jsonl")
    faults = faults_of(write(tmp_path, MINIMAL + "effects: e.jsonl\n"))
    assert ["line 1" in faults[0], "line 2" in faults[1], "line 3" in faults[2]] == [True] * 3
    assert len(faults) == 3 and "'name' is written twice" in faults[2]


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ObjectiveConfig().p_switch = 1.0  # type: ignore[misc]


def test_load_config_takes_the_preset_of_a_base_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the command is run."""
    base = tmp_path / "project" / "mybase"
    base.mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    (base / "clora.json").write_text('{"preset": "tiny"}')
    path = write(tmp_path / "project", "base: ./mybase\noutput_dir: o\n")
    for place in (tmp_path, path.parent):
        monkeypatch.chdir(place)
        assert load_config(path).preset == "tiny"


# ---- fingerprint ----


def test_fingerprint_feels_what_changes_a_step_and_nothing_else(tmp_path: Path) -> None:
    text = MINIMAL + "effects: [{name: a, prompt: p, lora: l/a.safetensors}]\n"
    path = write(tmp_path, text)
    plain = load_config(path).fingerprint()
    for unfelt in (
        "output_dir=elsewhere",
        "train.log_every=3",
        "train.checkpointing_steps=9",
        "train.max_train_steps=9000",
        "train.max_train_seconds=5",
        "eval.num_samples=2",
        "data_roots=[/x]",
        "prompts.model=other",
    ):
        assert load_config(path, [unfelt]).fingerprint() == plain, unfelt
    felt = (
        "seed=1",
        "train.learning_rate=2e-4",
        "train.lr_scheduler=cosine",
        "objective.p_switch=0.4",
        "schedule.shift=2.9",
        "effects.0.prompt=q",
        "effects.0.lora=l/b.safetensors",
        "base.dtype=float32",
        "student.rank=64",
        "prompts.trigger_scheme=rare",
    )
    prints = {load_config(path, [override]).fingerprint() for override in felt}
    assert len(prints) == len(felt) and plain not in prints
    # Two processes with half the batch each are one with the whole; the sizes of another job do not count.
    for job, key, unread in (("train", "train", "teach"), ("teach", "teach", "train"), ("joint", "train", "teach")):
        whole = load_config(path, [f"{key}.batch_size=4"]).fingerprint(job)
        halves = load_config(path, [f"{key}.batch_size=2", f"{unread}.batch_size=3"])
        assert halves.fingerprint(job, 2) == whole != halves.fingerprint(job)
    # Where the learning rate depends on the length of the run, the length counts.
    cosine = ["train.lr_scheduler=cosine"]
    longer = load_config(path, [*cosine, "train.max_train_steps=9000"]).fingerprint()
    assert longer != load_config(path, cosine).fingerprint()


@pytest.mark.parametrize(
    "job, section", [("train", "train"), ("teach", "teach"), ("joint", "teach"), ("extend", "extend")]
)
def test_fingerprint_counts_the_length_of_the_job_where_its_rate_does(tmp_path: Path, job: Job, section: str) -> None:
    """A run at a constant rate goes on for longer with `--resume`; one whose rate falls does not. The length of other
    jobs never counts."""
    path = write(tmp_path, MINIMAL)
    schedule = "teach" if section == "teach" else "train"
    for scheduler, counts in (("constant", False), ("cosine", True)):
        given = [f"{schedule}.lr_scheduler={scheduler}"]
        prints = {load_config(path, [*given, f"{section}.max_train_steps={n}"]).fingerprint(job) for n in (400, 600)}
        assert (len(prints) == 2) is counts
    teaches = {"teach": ("train", "extend"), "train": ("teach", "extend"), "extend": ("teach",)}[section]
    for other in teaches:
        longer = load_config(path, ["train.lr_scheduler=cosine", f"{other}.max_train_steps=700"]).fingerprint(job)
        assert longer == load_config(path, ["train.lr_scheduler=cosine"]).fingerprint(job)


@pytest.mark.parametrize(
    "given, says",
    [
        (["schedule.step_counts=[4,1]"], "in 1 step the last sigma is 1"),
        (["objective.tau_max=0.75", "schedule.step_counts=[4,2]"], "in 2 steps the last sigma is 0.75"),
        (["objective.tau_max=0.2", "schedule.step_counts=null"], "in 8 steps the last sigma is 0.3"),
    ],
)
def test_load_config_refuses_steps_that_target_simulation_cannot_start_from(
    tmp_path: Path, given: list[str], says: str
) -> None:
    path = write(tmp_path, MINIMAL + "effects: [{name: a, prompt: p, lora: l/a.safetensors}]\n")
    (fault,) = faults_of(path, *given, "objective.ts_sigma=schedule")
    assert says in fault and ("raise tau_max" in fault) is ("1 step " not in fault)
    for mend in ("objective.ts_sigma=continuous", "objective.dmd_ts_weight=0"):
        load_config(path, ["objective.ts_sigma=schedule", *given, mend])


@pytest.mark.parametrize(
    "given, says",
    [
        (["objective.imitation_weight=0"], "whose weight is 0; set objective.imitation_weight"),
        (["objective.imitation_below=0.2"], "no trained number of steps has one; raise it"),
        (["objective.ts_sigma=continuous", "objective.tau_max=0.5"], "leaves target simulation none"),
        (["schedule.step_counts=[4,2]", "objective.tau_max=0.75"], "none below objective.imitation_below (0.6)"),
    ],
)
def test_load_config_refuses_a_bound_that_leaves_imitation_or_matching_nothing(
    tmp_path: Path, given: list[str], says: str
) -> None:
    path = write(tmp_path, MINIMAL + "effects: [{name: a, prompt: p, lora: l/a.safetensors}]\n")
    base = ["objective.imitation_weight=1", "objective.imitation_below=0.6", "objective.ts_sigma=schedule"]
    load_config(path, [*base, "schedule.step_counts=[4,2]", "objective.tau_max=1"])
    assert any(says in fault for fault in faults_of(path, *base, "objective.tau_max=1", *given))


# A value that no preset has, for each field that is marked as deciding no number.
UNFELT = {
    "preset": "paper", "output_dir": "elsewhere", "data_roots": ["/x"], "eval.num_samples": 77,
    "prompts.model": "other", "train.max_train_seconds": 5.5, "train.gradient_checkpointing": True,
    "train.memory_budget_gb": 3.5, "train.checkpointing_steps": 77, "train.checkpoints_total_limit": 77,
    "train.report_to": "wandb", "train.sample_steps": 77, "train.log_every": 77, "train.teacher_slots": 77,
    "train.teacher_cache_gb": 7.5, "train.shard_base": True, "train.offload_base": True, "train.deterministic": True,
    "train.timeout_seconds": 7.5, "teach.save_dtype": "float16",
}  # fmt: skip


def marked(section: type[BaseModel], prefix: str = "") -> set[str]:
    """The fields of the schema that decide no number, under their dotted keys."""
    found = set()
    for name, field in section.model_fields.items():
        if field.json_schema_extra == {"numerics": False}:
            found.add(prefix + name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= marked(field.annotation, f"{prefix}{name}.")
    return found


def test_fingerprint_leaves_out_the_marked_fields_and_no_other() -> None:
    """Every field is marked or felt, and felt ones are in: a new one that decides no number needs its mark alone."""
    assert {key.replace("eval.num_samples", "eval").replace("prompts.model", "prompts") for key in UNFELT} == marked(
        Config
    )
    plain = build_config({"output_dir": "o", "base": "some/base", "train": {"gradient_checkpointing": False}})
    for key, value in UNFELT.items():
        first, _, rest = key.partition(".")
        inner = value if not rest else getattr(plain, first).model_copy(update={rest: value})
        changed = plain.model_copy(update={first: inner})
        assert changed != plain, key
        assert all(changed.fingerprint(job) == plain.fingerprint(job) for job in get_args(Job)), key
    felt = felt_values(plain)
    assert set(felt) == set(Config.model_fields) - {key for key in marked(Config) if "." not in key}
    train = {key.removeprefix("train.") for key in marked(Config) if key.startswith("train.")}
    assert set(felt["train"]) == set(TrainConfig.model_fields) - train


def test_fingerprint_is_the_same_whoever_named_the_targets(tmp_path: Path) -> None:
    """Left out, they are the base's own: the list that configurations spelled before (the authors', both streams)."""
    spelled = [
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1"),
    ]
    path = write(tmp_path, MINIMAL)
    left_out, named, fewer = (
        load_config(path, overrides).with_targets(QWEN_IMAGE_TARGETS)
        for overrides in ([], [f"student.targets=[{','.join(spelled)}]"], ["student.targets=[to_q]"])
    )
    assert load_config(path).student.targets is None and left_out.student.targets == spelled
    assert left_out.fingerprint() == named.fingerprint() != fewer.fingerprint()
    assert fewer.student.targets == ["to_q"] and left_out.folder == tmp_path
    assert "student.targets" in faults_of(path, "student.targets=[]")[0]


def test_fingerprint_survives_moving_the_folder(tmp_path: Path) -> None:
    text = MINIMAL + "effects: [{name: a, prompt: p, lora: l/a.safetensors}]\n"
    first, second = (load_config(write(tmp_path / place, text)) for place in ("one", "two/deep"))
    assert first.effects[0].lora != second.effects[0].lora
    assert first.fingerprint() == second.fingerprint()
