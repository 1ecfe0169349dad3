"""Imports inside clora/ and kernels/ point downward or stay in one layer; libraries stay in their place."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Top to bottom. A module may import from its own layer and from those below it.
LAYERS = (
    "__main__ cli app printing",
    "train teach plan extend groups demo evaluate edit editor validate export serve",
    "distill sample baselines targets workspace loop optimizer tracker provenance memory",
    "objective",
    "losses simulate teachers routing draws",
    "backbones data checkpoint tiny",
    "flow prompts prompt_rewriting catalogue config config_schema base_dir lora slots lora_files lora_alpha lora_keys "
    "quantize halves safetensors_io text_files distributed errors",
    "kernels _C",
)
LAYER_OF = {module: depth for depth, layer in enumerate(LAYERS) for module in layer.split()}

# Only these know the model libraries; only torch, triton and the standard library may be used by kernels.
MODEL_LIBRARIES = {"diffusers", "transformers"}
KNOW_MODEL_LIBRARIES = {"backbones", "tiny"}
KERNEL_LIBRARIES = {"torch", "triton"} | set(sys.stdlib_module_names)

# Import names that are not their distribution's name.
DISTRIBUTION_OF = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "prometheus_client": "prometheus-client",
}


def sources() -> list[Path]:
    """Every Python file of the package; clora/kernels is a link, so the files behind it are listed once."""
    package = [p for p in (ROOT / "clora").rglob("*.py*") if "kernels" not in p.relative_to(ROOT).parts]
    return sorted(p for p in [*package, *(ROOT / "kernels").rglob("*.py")] if p.suffix in {".py", ".pyi"})


def dotted_name(path: Path) -> str:
    """clora/evaluate/score.py -> clora.evaluate.score; kernels/lora.py -> clora.kernels.lora."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "clora")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every dotted name that the code imports, wherever in the file; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from clora import flow` names a module, `from clora.method.flow import add_noise` a function of one.
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value


def violations(code: str, name: str, is_package: bool = False) -> list[str]:
    """What `code`, the source of the dotted module `name`, may not import, each in one sentence."""
    place = name.split(".")[1] if "." in name else None
    if place is not None and place not in LAYER_OF:
        return [f"{name} belongs to no layer: give {place!r} a place in LAYERS and in docs/ARCHITECTURE.md"]
    found = []
    for target in imported(ast.parse(code), name if is_package else name.rpartition(".")[0]):
        top, _, rest = target.partition(".")
        inner = rest.split(".")[0]
        if target == "clora.__version__":  # the one name that the package root itself defines
            continue
        if top == "clora" and place is None:
            found.append(f"{name} imports {target}, but the package root imports nothing of the package")
        elif top == "clora" and inner not in LAYER_OF:
            found.append(f"{name} imports {target}, which is in no layer")
        elif top == "clora" and place is not None and LAYER_OF[inner] < LAYER_OF[place]:
            found.append(f"{name} imports {target}, which lies above it")
        elif top == "kernels":
            found.append(f"{name} imports {target}; inside the package the folder is clora.kernels")
        elif top in MODEL_LIBRARIES and place not in KNOW_MODEL_LIBRARIES:
            found.append(f"{name} imports {target}; only {sorted(KNOW_MODEL_LIBRARIES)} know {top}")
        elif place == "kernels" and top != "clora" and top not in KERNEL_LIBRARIES:
            found.append(f"{name} imports {target}; kernels use torch, triton and the standard library only")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    found = violations(path.read_text(encoding="utf-8"), dotted_name(path), path.stem == "__init__")
    assert not found, "\n".join(found)


def test_third_party_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + [r for name, more in extras.items() if name != "dev" for r in more]
    declared = {re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower() for requirement in requirements}
    known = {"clora", *sys.stdlib_module_names}
    faults = []
    for path in sources():
        found = imported(ast.parse(path.read_text(encoding="utf-8")), "clora.x")
        names = {name.split(".")[0] for name in found} - known
        missing = sorted(name for name in names if DISTRIBUTION_OF.get(name, name) not in declared)
        faults += [f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml lacks" for name in missing]
    assert not faults, "\n".join(faults)


def test_kernels_is_a_link_and_no_package() -> None:
    # A package named `kernels` exists on the package index; an __init__.py here would hide it.
    assert (ROOT / "clora" / "kernels").is_symlink()
    assert (ROOT / "clora" / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("clora.method.flow", "from clora.method.losses import dmd_loss"),
        ("clora.method.flow", "from clora import train"),
        ("clora.method.flow", "from .sample import few_step_sample"),
        ("clora.method.flow", "def f():\n    import clora.cli.commands"),
        ("clora.method.flow", "if TYPE_CHECKING:\n    from clora.lora.bank import Bank"),
        ("clora.method.flow", "import importlib\nimportlib.import_module('clora.jobs.train')"),
        ("clora.method.losses", "import diffusers.models"),
        ("clora.cli.commands", "from transformers import AutoTokenizer"),
        ("clora.data.cache", "from ..objective import total_loss"),
        ("clora.kernels.lora_linear", "import numpy"),
        ("clora.kernels.lora_linear", "from clora.errors import InputError"),
        ("clora.lora.adapters", "from kernels import lora_linear"),
        ("clora.newcomer", "import torch"),
        ("clora.cli.commands", "from clora.newcomer import f"),
        ("clora", "from clora.method.flow import add_noise"),
    ],
)
def test_violations_finds(name: str, code: str) -> None:
    assert len(violations(code, name)) == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("clora.jobs.train", "from clora.distill.step import step\nfrom clora import flow, _C\nimport torch"),
        ("clora.jobs.train", "from clora.evaluate.score import bad_case_rate"),
        ("clora.lora.adapters", "from clora.kernels.lora_linear import lora_linear"),
        ("clora.backbones.qwen_image.backbone", "import diffusers\nfrom ..flow import add_noise"),
        ("clora.tiny.world", "from transformers import Qwen2Tokenizer\nfrom . import base"),
        ("clora.kernels.lora_linear", "import math\nimport torch\nimport triton.language as tl"),
    ],
)
def test_violations_allows(name: str, code: str) -> None:
    assert violations(code, name) == []
