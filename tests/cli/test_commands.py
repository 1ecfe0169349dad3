"""cli: exit codes, one sentence per fault on stderr, JSON that parses, and a start without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from clora.backbones.load import linear_shapes
from clora.cli import commands as cli
from clora.config import Config, load_config
from clora.errors import InputError, InputErrors, Interrupted, NonFiniteError, ProcessLost, Stopped, WriteError
from clora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueSchedule, write_collection
from clora.lora.files import read_lora, write_lora
from clora.lora.module import LoraModule

COMMANDS = [
    "demo",
    "validate",
    "prompts",
    "cache",
    "teach",
    "plan-groups",
    "train",
    "extend",
    "edit",
    "eval",
    "inspect",
    "convert",
    "export",
    "verify",
    "serve",
    "study",
]


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def faults(result: Any) -> list[str]:
    """The lines of stderr that report an error; there is no other kind of line, a traceback least of all."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert all(line.startswith("error: ") for line in lines), result.stderr
    return [line.removeprefix("error: ") for line in lines]


@pytest.fixture(scope="module")
def modules(random_base: Path) -> dict[str, LoraModule]:
    rng = torch.Generator().manual_seed(0)
    return {
        name: LoraModule(torch.randn(2, K, generator=rng), torch.randn(N, 2, generator=rng), 1.0)
        for name, (N, K) in linear_shapes(random_base).items()
        if name.endswith(("to_q", "img_mod.1"))
    }


@pytest.fixture
def workplace(tmp_path: Path, random_base: Path, modules: dict[str, LoraModule]) -> Path:
    """A folder with two effects (LoRA and pairs), a configuration and a collection."""
    rng = np.random.default_rng(0)
    rows = []
    for name in ("a", "b", "c", "d"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    for image, control in (("a", "b"), ("c", "d")):
        rows.append({"image_path": f"{image}.png", "control_path": f"{control}.png", "caption": "paint it"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_lora(tmp_path / "lora.safetensors", modules)
    effect = {"prompt": "paint it", "lora": "lora.safetensors", "pairs": "pairs.jsonl"}
    values = {
        "base": str(random_base),
        "output_dir": "out",
        "objective": {"p_switch": 1},
        "effects": [{"name": "first", **effect}, {"name": "second", **effect}],
    }
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    entries = [
        CatalogueEntry(name=name, trigger=f"<{name}>", student_prompt="paint it") for name in ("first", "second")
    ]
    schedule = CatalogueSchedule(num_steps=2, shift=3.0)
    catalogue = Catalogue(base=str(random_base), schedule=schedule, effects=entries)
    write_collection(tmp_path / "collection.safetensors", modules, catalogue)
    return tmp_path


# The program


def test_help_of_every_command_has_an_example() -> None:
    listed = call("--help").stdout
    assert [line.split()[0] for line in listed.split("Commands:")[1].splitlines() if line.strip()] == COMMANDS
    for name in COMMANDS:
        result = call(name, "--help")
        example = result.stdout.split("Example:\n")[1].split("\n\n")[0]
        assert result.exit_code == 0 and f"clora {name} " in example, name


def test_start_imports_no_heavy_library() -> None:
    heavy = {"torch", "numpy", "diffusers", "transformers", "omegaconf", "PIL", "rich.progress"}
    code = (
        "import sys, clora.cli.commands\n"
        "try: clora.cli.commands.run_command(['train', '--help'])\n"
        f"finally: print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    result = call("--version")
    assert result.exit_code == 0 and result.stdout == f"clora {version('clora')}\n"


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["convert", "a", "b", "--to", "onnx"], ["edit", "--steps", "0"]]
)
def test_usage_errors_are_bad_input(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2 and "Error" in result.stderr and result.stdout == ""


def raising(error: BaseException) -> Any:
    def job(*_: Any, **__: Any) -> None:
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (InputErrors(["a: is bad; mend it", "b: is bad"]), 2, ["a: is bad; mend it", "b: is bad"]),
        (NonFiniteError("loss is nan at step 3"), 1, ["loss is nan at step 3"]),
        (RuntimeError("out of\nmemory"), 1, ["RuntimeError: out of memory (--debug shows where)"]),
        (OSError(28, "No space"), 1, ["OSError: [Errno 28] No space (--debug shows where)"]),
        (Interrupted(signal.SIGTERM, Path("out/step-7")), 143, [
            "stopped by SIGTERM; saved out/step-7; go on with --resume latest"
        ]),
        (KeyboardInterrupt(), 130, []),
        (Stopped("stopped: 3 of 9 images written to out"), 130, ["stopped: 3 of 9 images written to out"]),
        (WriteError("output: a.png could not be written"), 1, ["output: a.png could not be written"]),
    ],
)  # fmt: skip
def test_errors_become_lines_and_exit_codes(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, lines: list[str]
) -> None:
    monkeypatch.setattr("clora.jobs.train.train", raising(error))
    result = call("train", workplace / "config.yaml")
    assert (result.exit_code, faults(result), result.stdout) == (code, lines, "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NonFiniteError("loss is nan at step 3"), 1, ""),  # which all processes raise: the first one says it
        (Interrupted(signal.SIGTERM, Path("out/step-7")), 143, ""),
        (ProcessLost("process 1 of 2 at step 3: gone"), 1, "error of process 1: process 1 of 2 at step 3: gone\n"),
        (InputError("a: is bad; mend it"), 2, "error of process 1: a: is bad; mend it\n"),
        (None, 0, ""),
    ],
)
def test_other_processes_say_only_what_is_their_own(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int, said: str
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("clora.jobs.train.train", (lambda *_: Path("c")) if error is None else raising(error))
    result = call("train", workplace / "config.yaml")
    assert (result.exit_code, result.stderr, result.stdout) == (code, said, "")


def test_commands_of_one_process_refuse_torchrun(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call("validate", workplace / "config.yaml")
    assert result.exit_code == 2 and faults(result) == ["`clora validate` is one process; start it without torchrun"]


def test_debug_shows_the_traceback_wherever_it_stands(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("clora.jobs.train.train", raising(RuntimeError("broken")))
    config = str(workplace / "config.yaml")
    for arguments in (["--debug", "train", config], ["train", config, "--debug"]):
        monkeypatch.setattr(sys, "argv", ["clora", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and "Traceback" in error and error.endswith("error: RuntimeError: broken\n")
    monkeypatch.setattr(sys, "argv", ["clora-train", config])
    with pytest.raises(SystemExit) as stopped:
        cli.train_main()
    assert stopped.value.code == 1 and "Traceback" not in capsys.readouterr().err


def test_jobs_get_their_arguments(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def job(result: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(args)
            return result

        return run

    monkeypatch.setattr("clora.jobs.train.train", job(Path("c.safetensors")))
    monkeypatch.setattr("clora.jobs.train.make_caches", job({"first": 3, "general": 2}))
    monkeypatch.setattr("clora.jobs.teach.teach", job({"first": Path("first.safetensors")}))
    monkeypatch.setattr(
        "clora.jobs.eval.evaluate_collection",
        job({"effects": {"first": {"psnr": 21.123456}}, "mean": {"psnr": 20.0}, "grid": "g.png"}),
    )
    monkeypatch.setattr("clora.jobs.demo.run_demo", job(Path("report.html")))
    config = workplace / "config.yaml"

    result = call("train", config, "seed=5", "train.batch_size=3", "--resume", "latest")
    assert result.stdout == "c.safetensors\n"
    given, resume = calls.pop()
    assert isinstance(given, Config) and (given.seed, given.train.batch_size, resume) == (5, 3, "latest")
    assert json.loads(call("cache", config, "--json").stdout) == {"first": 3, "general": 2}
    assert calls.pop()[0] == load_config(config)
    assert call("teach", config, "--joint").stdout == "first.safetensors\n" and calls.pop()[1:] == (
        True,
        None,
    )
    result = call("eval", config, "--lora", "c.safetensors")
    assert calls.pop()[1] == Path("c.safetensors") and "21.12" in result.stdout and "mean.psnr" in result.stdout
    assert json.loads(call("eval", config, "--lora", "c", "--json").stdout)["effects"]["first"]["psnr"] == 21.123456
    assert call("demo", "--out", "runs/x", "--effects", 5, "--size", "smoke").stdout == "report.html\n"
    assert calls.pop() == (Path("runs/x"), 5, "smoke", 0)


# Commands on files


def test_validate_passes_a_good_configuration(workplace: Path) -> None:
    result = call("validate", workplace / "config.yaml")
    assert result.exit_code == 0 and faults(result) == []
    assert "ok (2 effects, 4 pairs, 4 images, 1 warnings)" in result.stdout
    assert "lora.safetensors is the LoRA of effects.0.lora and effects.1.lora" in result.stderr
    found = json.loads(call("validate", workplace / "config.yaml", "--json").stdout)
    assert found["ok"] and found["faults"] == [] and found["num_images"] == 4


def test_validate_lists_every_fault(workplace: Path) -> None:
    (workplace / "b.png").write_bytes((workplace / "b.png").read_bytes()[:100])
    config = workplace / "config.yaml"
    arguments = ["validate", config, "effects.0.lora=gone.safetensors", "effects.1.prompt=" + "paint " * 600]
    result = call(*arguments)
    found = faults(result)
    assert result.exit_code == 2 and "4 faults" in result.stdout
    assert any("effects.0.lora: LoRA file gone.safetensors is missing" in fault for fault in found)
    assert any("b.png is damaged or cut off" in fault for fault in found)
    for key in ("effects.1.prompt", "effects.1.student_prompt"):
        assert any(fault.startswith(key) and "shorten it" in fault for fault in found)
    as_json = call(*arguments, "--json")
    assert as_json.exit_code == 2 and json.loads(as_json.stdout)["faults"] == found


def test_validate_names_the_nearest_key_once(workplace: Path) -> None:
    result = call("validate", workplace / "config.yaml", "train.learnin_rate=1e-3")
    assert result.exit_code == 2 and len(faults(result)) == 1
    assert "unknown key 'train.learnin_rate'; did you mean 'train.learning_rate'?" in faults(result)[0]
    result = call("validate", workplace / "no.yaml", "--json")
    assert result.exit_code == 2 and "no.yaml does not exist" in json.loads(result.stdout)["faults"][0]


def test_validate_refuses_a_base_of_another_kind(workplace: Path) -> None:
    (workplace / "base").mkdir()
    (workplace / "base" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    result = call("validate", workplace / "config.yaml", "base=./base")
    assert result.exit_code == 2 and any("base: " in f and "FluxPipeline" in f for f in faults(result))


def test_prompts_writes_a_file_that_effects_can_name(workplace: Path) -> None:
    result = call("prompts", workplace / "config.yaml", "--output", workplace / "effects.jsonl", "--json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 0 and [row["effect"] for row in rows] == ["first", "second"]
    assert len({row["trigger"] for row in rows}) == 2 and {row["from"] for row in rows} == {"template"}
    config = load_config(workplace / "config.yaml", ["effects=effects.jsonl"])
    assert [effect.trigger for effect in config.effects] == [row["trigger"] for row in rows]


def test_inspect_shows_a_collection_and_a_damaged_file(workplace: Path, modules: dict[str, LoraModule]) -> None:
    found = json.loads(call("inspect", workplace / "collection.safetensors", "--json").stdout)
    assert [(e["name"], e["trigger"]) for e in found["effects"]] == [
        ("first", "<first>"),
        ("second", "<second>"),
    ]
    assert found["lora"]["ranks"] == {"2": len(modules)} and found["lora"]["faults"] == []
    human = call("inspect", workplace / "collection.safetensors")
    assert human.exit_code == 0 and "<second>" in human.stdout and "lora.layout" in human.stdout

    path = workplace / "half.safetensors"
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 4)}, path)
    result = call("inspect", path, "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["lora"]["faults"] == faults(result)
    assert "has no lora_B" in faults(result)[0]


@pytest.mark.parametrize("name", ["lora.ckpt", "gone.safetensors"])
def test_inspect_refuses_what_is_no_lora_file(workplace: Path, name: str) -> None:
    (workplace / "lora.ckpt").write_bytes(b"\x80\x04K\x01.")
    result = call("inspect", workplace / name)
    assert result.exit_code == 2 and len(faults(result)) == 1 and name in faults(result)[0]


def test_convert_keeps_every_update(workplace: Path, modules: dict[str, LoraModule]) -> None:
    source, target = workplace / "lora.safetensors", workplace / "kohya.safetensors"
    result = call("convert", source, target, "--to", "kohya", "--json")
    wanted = {"output": str(target), "from": "comfyui", "to": "kohya", "num_modules": len(modules)}
    assert result.exit_code == 0 and json.loads(result.stdout) == wanted | {"max_rank": 2, "lost": None, "notes": []}
    before, after = read_lora(source).modules, read_lora(target)
    assert after.layout == "kohya" and after.modules.keys() == before.keys()
    assert all(torch.equal(after.modules[name].delta(), before[name].delta()) for name in before)
    result = call("convert", source, workplace / "adapter", "--to", "peft")
    again = call("convert", source, workplace / "adapter", "--to", "peft")
    assert result.exit_code == 0 and again.exit_code == 2 and "is there already" in faults(again)[0]
    assert read_lora(workplace / "adapter").modules.keys() == before.keys()
    result = call("convert", source, workplace / "out.bin", "--to", "kohya")
    assert result.exit_code == 2 and "out.bin: name the output .safetensors" in faults(result)[0]


def test_convert_to_a_rank_and_by_a_base(workplace: Path, random_base: Path) -> None:
    """What is lost is printed; a note goes to stderr; DoRA needs the base and gets it by its folder."""
    name = "transformer_blocks.0.attn.to_q"
    factors = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(12, 12)}
    stem, target = f"diffusion_model.{name}", workplace / "ranked.safetensors"
    lone = {"diffusion_model.transformer_blocks.1.attn.to_q.alpha": torch.tensor(1.0)}
    save_file({f"{stem}.{part}": tensor for part, tensor in factors.items()} | lone, workplace / "lokr.safetensors")
    result = call("convert", workplace / "lokr.safetensors", target, "--to", "comfyui", "--rank", 3)
    sigma = torch.linalg.svdvals(torch.kron(factors["lokr_w1"].double(), factors["lokr_w2"].double()))
    lost = float(sigma[3:].norm() / sigma.norm())
    assert result.exit_code == 0 and f"rank 3; lost {lost:.2%} of an update at most ({name})" in result.stdout
    assert result.stderr.startswith("note: ") and "belongs to no matrix" in result.stderr
    dora = {f"{stem}.lora_A.weight": torch.ones(1, 48), f"{stem}.lora_B.weight": torch.ones(48, 1)}
    save_file(dora | {f"{stem}.dora_scale": torch.ones(48, 1)}, workplace / "dora.safetensors")
    command = ("convert", workplace / "dora.safetensors", target, "--to", "kohya", "--rank", 2, "--json")
    result = call(*command)
    assert result.exit_code == 2 and "is DoRA's" in faults(result)[0] and len(faults(result)) == 1
    result = call(*command, "--base", random_base)
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["max_rank"] == 2 and 0 < answer["lost"]["max"] < 1
    result = call(*command, "--base", "Nobody/at-all")
    assert result.exit_code == 2 and "not in the local hub cache; download it with" in faults(result)[0]


def test_edit_writes_the_images(workplace: Path, random_base: Path) -> None:
    images = ["--image", workplace / "a.png", "--image", workplace / "b.png"]
    lora = ["--lora", workplace / "collection.safetensors"]
    result = call("edit", *lora, *images, "--effect", "first", "--output", workplace / "made", "--json")
    outputs = [str(workplace / "made" / name) for name in ("a.png", "b.png")]
    assert result.exit_code == 0 and json.loads(result.stdout) == {"outputs": outputs}
    assert [Image.open(path).size for path in outputs] == [(64, 64)] * 2

    result = call("edit", *lora, *images, "--effect", "frist", "--output", workplace / "one.png")
    assert result.exit_code == 2 and [("did you mean 'first'" in f, "name a folder" in f) for f in faults(result)] == [
        (False, True),
        (True, False),
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "3000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_run_command_limits_the_spinning_of_threads_before_torch_is_loaded(
    given: dict[str, str], expected: str | None
) -> None:
    code = (
        "import os, sys; from clora.cli import commands, app\n"
        "assert 'torch' not in sys.modules\n"
        "app.app = lambda *a, **k: None\n"
        "app.run_command([]); print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)


def test_export_and_verify_answer_with_json_and_codes(tmp_path: Path) -> None:
    folder = tmp_path / "artefact"
    own = ("--base", "tiny", "--format", "merged", "--output", folder)
    made = call("export", *own, "--edits", 1, "--json", "--triton")
    assert made.exit_code == 0 and json.loads(made.stdout)["parity"]["ok"]
    model = Path(json.loads(made.stdout)["triton"])
    assert model == tmp_path / "model_repository" / "artefact" and (model / "1" / "model.py").is_file()
    again = call("export", *own)
    assert again.exit_code == 2 and faults(again) == [
        f"output: {folder} is there already; name a new folder, or remove it"
    ]
    checked = call("verify", folder, "--edits", 1, "--json")
    assert checked.exit_code == 0 and json.loads(checked.stdout)["padding"] == 0
    with (folder / "vae" / "config.json").open("a") as file:
        file.write(" ")
    refused = call("verify", folder)
    assert refused.exit_code == 2 and "vae/config.json has" in faults(refused)[0]
