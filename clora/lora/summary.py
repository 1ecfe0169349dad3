"""What the header of a LoRA file says: which tensors make which module, and every fault that shows in it.

Every tensor of a file is used, told in a note, or a fault: a key that is silently left out is an effect that is
silently another. Faults of one cause are one sentence, with a count and the first key.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path

import torch

from clora.errors import nearest, raise_faults
from clora.io.safetensors import Header, read_header
from clora.lora.foreign import FAMILY, is_text_encoder, model_of, model_of_width, other_kind
from clora.lora.keys import LoraKey, Part, layout_of, name_resolver, parse_key
from clora.lora.kinds import Kind, exact_rank, kind_of, missing_parts, weight_shape
from clora.lora.peft_folder import weights_file

# The names of a transformer's linear layers, with their weights' shapes (N, K) where shapes are to be checked.
ModuleNames = Collection[str] | Mapping[str, tuple[int, int]]

# Updates that need a higher rank are read only after `clora convert --rank` has made a LoRA of them: teachers of such
# ranks would fill the memory, and what a smaller rank loses is to be seen by someone.
MAX_EXACT_RANK = 256

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Outputs and inputs of a block's linears as multiples of its width, where they are not both one.
_MULTIPLES = {"_mlp.net.0.proj": (4, 1), "_mlp.net.2": (1, 4), "_mod.1": (6, 1)}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class LoraSummary:
    """What the header alone tells, by module: the keys of its tensors, the kind of its update, the rank of the LoRA
    that is exactly this update, and (N, K) of the weight. `notes` say what was not taken as it lies in the file."""

    path: Path
    layout: str
    keys: dict[str, dict[Part, str]]
    kinds: dict[str, Kind]
    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    header: Header
    notes: tuple[str, ...]

    @property
    def max_rank(self) -> int:
        return max(self.ranks.values())


class Causes:
    """Sentences about a file, one for each cause: the first case in full, and how many more there are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cases: dict[tuple[str, str], list[str]] = {}

    def add(self, cause: str, case: str, mend: str) -> None:
        """`case` names a key or module and its fault; cases of equal `cause` and `mend` are one sentence."""
        self._cases.setdefault((cause, mend), []).append(case)

    def sentences(self) -> list[str]:
        return [f"{self._path}: {cases[0]}{more(cases)}; {mend}" for (_, mend), cases in self._cases.items()]


def more(cases: Sized) -> str:
    """How many cases there are beside the first, for the sentence that names that."""
    return f", and {len(cases) - 1} more like it" if len(cases) > 1 else ""


def check_lora(path: str | Path, module_names: ModuleNames | None = None) -> LoraSummary:
    """Check a LoRA file by its header alone, without reading a tensor.

    Against `module_names` when given (a transformer's linear layers, with shapes if it is a mapping), else against
    the names of a Qwen-Image transformer of any depth. Raises `InputErrors` with every fault: another model's
    modules, text encoders, kinds that are no LoRA, A without B, wrong shapes or dtypes.
    """
    summary, faults = summarise(Path(path), module_names)
    raise_faults([*faults, *unready_faults(summary)])
    return summary


def summarise(path: Path, module_names: ModuleNames | None) -> tuple[LoraSummary, list[str]]:
    """Sort a file's keys into modules; every key ends in exactly one module, note or fault.

    Of a PEFT folder it is the file in it (`path` of the summary). Raises `InputError` only where the file is no
    safetensors at all.
    """
    path = weights_file(path)
    header = read_header(path)
    found = _sort(header, module_names)
    foreign = _foreign_fault(path, found, header)
    if foreign is not None:
        return LoraSummary(path, "none", {}, {}, {}, {}, header, ()), [foreign]
    causes = Causes(path)
    _tell_left_out(found, causes)
    twice = {module for _, _, module in found.twice}
    kinds = {
        name: kind
        for name, keys in found.modules.items()
        if name not in twice and (kind := _checked_kind(header, name, keys, causes)) is not None
    }
    shapes = {name: _shapes(header, found.modules[name]) for name in kinds}
    summary = LoraSummary(
        path,
        found.layouts.pop() if len(found.layouts) == 1 else "mixed" if found.layouts else "none",
        {name: found.modules[name] for name in kinds},
        kinds,
        {name: exact_rank(kind, shapes[name]) for name, kind in kinds.items()},
        {name: weight_shape(kind, shapes[name]) or (0, 0) for name, kind in kinds.items()},
        header,
        _notes(path, header, found, kinds),
    )
    faults = causes.sentences()
    if module_names is not None:
        faults += _name_faults(summary, module_names)
    if not found.modules and not faults:
        what = "no LoRA, only alphas" if header.tensors else "no tensors at all"
        faults.append(f"{path}: holds {what}; export the LoRA again")
    return summary, faults


def unready_faults(summary: LoraSummary, to: str = "comfyui") -> list[str]:
    """Modules that are no LoRA as they are, and how `clora convert` makes one of them, in the layout `to`: DoRA, and
    updates of too high a rank."""
    out = "OUT" if to == "peft" else "OUT.safetensors"
    causes, convert = Causes(summary.path), f"clora convert {summary.path} {out} --to {to} --rank 64"
    for name, keys in summary.keys.items():
        if "dora" in keys:
            case = f"{keys['dora']} is DoRA's, which rescales the base's own weights"
            causes.add("dora", case, f"make the nearest LoRA, with what is lost: {convert} --base BASE")
        elif (rank := summary.ranks[name]) > MAX_EXACT_RANK:
            case = f"{name} is {summary.kinds[name]} of rank {rank}, above the {MAX_EXACT_RANK} that are read"
            causes.add("rank", case, f"make the nearest LoRA, with what is lost: {convert}")
    return causes.sentences()


def width_findings(summary: LoraSummary) -> tuple[list[str], list[str]]:
    """Faults and notes about the widths of modules, for files that are held against no base.

    Layers of another model's width are a fault where their names are ours too. Every linear of a Qwen-Image block has D
    or a multiple of D inputs and outputs; modules of other proportions than the first one's are a note.
    """
    causes, width = Causes(summary.path), 0
    for name, (N, K) in summary.shapes.items():
        if not name.startswith("transformer_blocks."):
            continue
        outputs, inputs = next((m for end, m in _MULTIPLES.items() if name.endswith(end)), (1, 1))
        width = width or K // inputs
        if (N, K) != (outputs * width, inputs * width):
            ours = f"where a {FAMILY} transformer {width} wide has {[outputs * width, inputs * width]}"
            causes.add(
                "width", f"{name} is for a weight {[N, K]}, {ours}", "`clora convert --base BASE` checks every shape"
            )
    model = model_of_width(width)
    if model is None:
        return [], causes.sentences()
    what = f"is a LoRA of {model}, by the {width} inputs of its layers"
    return [f"{summary.path}: {what}; give one trained on {FAMILY} or {FAMILY}-Edit"], []


@dataclass
class _Found:
    """A file's keys, sorted."""

    modules: dict[str, dict[Part, str]] = field(default_factory=dict)
    layouts: set[str] = field(default_factory=set)
    adapters: set[str] = field(default_factory=set)
    twice: list[tuple[str, str, str]] = field(default_factory=list)  # key, the other key, module
    unknown: list[tuple[str, str]] = field(default_factory=list)  # key and stem, of no module of the family
    lone_alphas: list[str] = field(default_factory=list)
    encoders: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # keys that are no part of a LoRA


def _sort(header: Header, module_names: ModuleNames | None) -> _Found:
    resolve, found = name_resolver(module_names), _Found()
    stems: dict[str, list[tuple[str, LoraKey]]] = {}
    for key in sorted(header.tensors):
        parsed = parse_key(key)
        if is_text_encoder(key):
            found.encoders.append(key)
        elif parsed is None:
            found.others.append(key)
        else:
            stems.setdefault(parsed.stem, []).append((key, parsed))
    # Alphas alone come last, when it is known whose they may be.
    for stem, keys in sorted(stems.items(), key=lambda item: all(key.part == "alpha" for _, key in item[1])):
        module = resolve(stem)
        if all(parsed.part == "alpha" for _, parsed in keys) and module not in found.modules:
            found.lone_alphas += [key for key, _ in keys]
        elif module is None:
            found.unknown += [(key, stem) for key, _ in keys]
        else:
            found.layouts.add(layout_of(stem)[0])
            _take(found, module, keys)
    return found


def _take(found: _Found, module: str, keys: list[tuple[str, LoraKey]]) -> None:
    parts = found.modules.setdefault(module, {})
    for key, parsed in keys:
        if parsed.adapter is not None:
            found.adapters.add(parsed.adapter)
        if parsed.part in parts:
            found.twice.append((key, parts[parsed.part], module))
        else:
            parts[parsed.part] = key


def _foreign_fault(path: Path, found: _Found, header: Header) -> str | None:
    """One sentence for a file that is another model's; None where it is not."""
    strange = [key for key, _ in found.unknown] + found.others
    model = model_of([*(stem for _, stem in found.unknown), *found.others])
    if found.others and not (found.modules or found.unknown or found.lone_alphas or found.encoders):
        if all(other_kind(key) is None or key.endswith(".bias") for key in found.others):
            what = f"holds {len(found.others)} tensors that are no LoRA's (first {found.others[0]})"
            return f"{path}: {what}; give a LoRA, not a whole model"
    if not found.unknown or (model is None and found.modules):
        return None
    whose = f"is a LoRA of {model}, by its names" if model else "names no module of a model that clora knows"
    return (
        f"{path}: {whose} ({len(strange)} of {len(header.tensors)} tensors, first {strange[0]});"
        f" give one trained on {FAMILY} or {FAMILY}-Edit"
    )


def _tell_left_out(found: _Found, causes: Causes) -> None:
    """Faults of keys that end in no module, or are there twice."""
    mend = "clora leaves that as it is, so the effect would be another: train the transformer alone"
    for key in found.encoders:
        causes.add("encoder", f"{key} changes a text encoder", mend)
    for key in found.others:
        what, mend = other_kind(key) or ("no tensor of a LoRA that clora knows", "export the LoRA again")
        causes.add(what, f"{key} is {what}", mend)
    if found.unknown:
        near = nearest(layout_of(found.unknown[0][1])[1], found.modules)
        where = f"names no module of a {FAMILY} transformer{f' (the nearest is {near})' if near else ''}"
        for key, _ in found.unknown:
            causes.add("unknown", f"{key} {where}", f"give a LoRA trained on {FAMILY} or {FAMILY}-Edit")
    if len(found.adapters) > 1:
        names = ", ".join(sorted(found.adapters)[:4])
        causes.add("adapters", f"holds {len(found.adapters)} adapters ({names})", "save each in a file of its own")
    else:
        for key, other, module in found.twice:
            causes.add("twice", f"{key} and {other} are the same matrix of {module}", "export the LoRA again")


def _checked_kind(header: Header, name: str, keys: Mapping[Part, str], causes: Causes) -> Kind | None:
    """The kind of a module whose tensors are whole and fit each other; None, and the causes, of another."""
    kind = kind_of(keys)
    if kind is None:
        what = "is of several kinds at once" if len(keys) > 1 else "is the only tensor of its module"
        causes.add(what, f"{next(iter(keys.values()))} {what}", "export the LoRA again")
        return None
    if missing := missing_parts(kind, keys):
        case = f"{name} has no {missing[0]}, only {', '.join(keys.values())}"
        causes.add(f"no {missing[0]}", case, "export the LoRA again")
        return None
    faulty = [_entry_fault(header, part, key, causes) for part, key in keys.items()]
    if any(faulty):
        return None
    shapes = _shapes(header, keys)
    weight = weight_shape(kind, shapes)
    if weight is None:
        listed = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items() if part not in ("alpha", "dora"))
        causes.add("misfit", f"{name} has matrices that do not fit each other ({listed})", "export the LoRA again")
        return None
    if "dora" in shapes and shapes["dora"] not in ((weight[0],), (weight[0], 1), (1, weight[1])):
        case = f"{keys['dora']} has shape {list(shapes['dora'])} for a weight {list(weight)}"
        causes.add("norms", case, "export the LoRA again")
        return None
    return kind


def _entry_fault(header: Header, part: Part, key: str, causes: Causes) -> bool:
    """Whether one tensor has a shape or type that its part cannot have."""
    entry = header.tensors[key]
    if entry.dtype not in FLOATS + FLOAT8 and not (part == "alpha" and entry.dtype in _INTEGERS):
        causes.add(f"is {entry.dtype}", f"{key} is {entry.dtype}", "save it as bfloat16, float16 or float32")
    elif part == "alpha" and math.prod(entry.shape) != 1:
        case = f"{key} has shape {list(entry.shape)} where one number is expected"
        causes.add("alpha's shape", case, "export the LoRA again")
    elif part not in ("alpha", "dora") and len(entry.shape) > 2:
        case = f"{key} has shape {list(entry.shape)} where a matrix is expected"
        causes.add("convolution", case, f"it is a convolution's, which a {FAMILY} transformer has none of")
    elif part not in ("alpha", "dora") and (len(entry.shape) != 2 or 0 in entry.shape):
        case = f"{key} has shape {list(entry.shape)} where a matrix is expected"
        causes.add("matrix", case, "export the LoRA again")
    else:
        return False
    return True


def _shapes(header: Header, keys: Mapping[Part, str]) -> dict[Part, tuple[int, ...]]:
    return {part: header.tensors[key].shape for part, key in keys.items()}


def _notes(path: Path, header: Header, found: _Found, kinds: Mapping[str, Kind]) -> tuple[str, ...]:
    """What is true of a file that is read well all the same."""
    notes = []
    if found.lone_alphas:
        first = found.lone_alphas[0]
        notes.append(f"{path}: {first} belongs to no matrix{more(found.lone_alphas)}; ignored, as it changes nothing")
    small = [key for name in kinds for key in found.modules[name].values() if header.tensors[key].dtype in FLOAT8]
    if small:
        dtype = str(header.tensors[small[0]].dtype).removeprefix("torch.")
        notes.append(f"{path}: {small[0]} is {dtype}{more(small)}; read as bfloat16, which is exact")
    return tuple(notes)


def _name_faults(summary: LoraSummary, module_names: ModuleNames) -> list[str]:
    """Modules that the transformer lacks, and those whose shape differs from the transformer's."""
    causes = Causes(summary.path)
    unknown = [name for name in summary.kinds if name not in module_names]
    near = nearest(unknown[0], module_names) if unknown else None
    for name in unknown:
        where = f"is not on this transformer{f' (the nearest is {near})' if near else ''}"
        causes.add("unknown", f"{name} {where}", "give a LoRA trained on this base, or adapt these linears too")
    if isinstance(module_names, Mapping):
        for name in sorted(summary.kinds.keys() & module_names.keys()):
            given, wanted = summary.shapes[name], tuple(module_names[name])
            if given != wanted:
                case = f"{name} is for a weight {list(given)}, the transformer's is {list(wanted)}"
                causes.add("shape", case, "give a LoRA trained on this base")
    return causes.sentences()
