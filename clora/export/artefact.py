"""An artefact opened on its device: its velocity, at the noise levels of its schedule.

Shape legend: B batch, T image tokens, C latent channels per token.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import ValidationError

from clora.backbones.base import Backbone
from clora.backbones.cond import VaeGraph
from clora.backbones.load import choose_device, load_backbone, rotary_positions, served_network
from clora.config import base_identity
from clora.errors import InputError
from clora.export.aoti import open_aoti
from clora.export.graph import Run, run_on
from clora.export.graph_velocity import GraphVelocity
from clora.export.manifest import Manifest, check_folder
from clora.export.onnx_graph import has_runtime, open_onnx
from clora.export.tensorrt_engine import open_engine, why_not_here
from clora.export.vae_graphs import open_vae
from clora.inference.batching import Served
from clora.lora.catalogue import Catalogue
from clora.method.flow import Velocity, few_step_sigmas

MADE_FOR = {"aoti": "cpu", "onnx": "cpu", "tensorrt": "cuda"}  # merged weights go anywhere
LIBRARIES = ("clora", "diffusers", "numpy", "onnx", "onnxruntime", "torch", "transformers")


@dataclass(frozen=True, eq=False)
class Artefact:
    """`velocity` is (x (B, T, C), sigma (B,), cond) -> (B, T, C), as `Backbone.velocity` without slots; `vae` encodes
    and decodes in place of the base's, where the artefact has graphs of it. `device`: of the network's weights."""

    folder: Path
    manifest: Manifest
    catalogue: Catalogue
    opened: GraphVelocity | Backbone
    device: torch.device
    vae: tuple[VaeGraph, VaeGraph] | None = None

    @property
    def velocity(self) -> Velocity:
        return self.opened if isinstance(self.opened, GraphVelocity) else self.opened.velocity

    def served(self) -> Served:
        """The network for a `StepBatcher`. Of a merged artefact it is the one that graphs are made of, eager, over the
        same weights: what shares a batch must differ in step and text length alone."""
        graph, manifest = self.opened, self.manifest
        sigmas = few_step_sigmas(manifest.num_steps, manifest.shift)
        if not isinstance(graph, GraphVelocity):
            run = run_on(served_network(graph, sigmas), self.device)
            graph = _graph_velocity(run, self.folder, manifest, str(self.folder))
        return Served(
            graph.run, graph.conditions, sigmas, manifest.sampler, graph.dtype, most_batch=manifest.limits.batch
        )


def open_artefact(
    folder: Path, base: str | None = None, key: Path | None = None, device: str | None = None
) -> Artefact:
    """Check every file of an artefact, then open it on its device (`device_of`). `base` says where its base is now,
    None: where it was. With a public `key` it must be signed by its owner.

    Raises `InputErrors` as `check_folder` does, and `InputError` for one that was made for another machine or torch or
    cannot be on that device; nothing of the folder is loaded before that.
    """
    manifest = check_folder(folder, key)
    return open_files(folder, manifest, base, device_of(folder, manifest, device))


def open_files(folder: Path, manifest: Manifest, base: str | None, device: torch.device) -> Artefact:
    """`open_artefact` for files that are known to be what `manifest` says; raises as it does for the rest."""
    catalogue = check_fit(folder, manifest)
    opened = _open(folder, manifest, base or manifest.base, device)
    has_vae = manifest.format != "merged" and manifest.components.get("vae") == "artefact"
    vae = open_vae(folder, manifest.format, manifest.dtype) if has_vae else None
    return Artefact(folder, manifest, catalogue, opened, device, vae)


def device_of(folder: Path, manifest: Manifest, name: str | None) -> torch.device:
    """Where an artefact runs, with the encoders around it: the device of that name, None: a GPU if there is one and it
    can run there. `InputError` for a device that is not there, or that it was not made for."""
    kind = MADE_FOR.get(manifest.format)
    if kind is not None and name is not None and name.split(":")[0] != kind:
        raise InputError(f"device: {folder} is code for {kind}, not for {name}; leave it out")
    return choose_device("cpu" if kind == "cpu" else name)


def base_of(folder: Path, manifest: Manifest, base: str | None) -> str:
    """The base around an artefact's network: itself where it is merged, else `base`, None: the manifest's. Raises
    `InputError` for another than it was exported from."""
    if manifest.format == "merged":
        return str(folder)
    base = base or manifest.base
    check_base(folder, manifest, base)
    return base


def open_encoders(artefact: Artefact, base: str) -> Backbone:
    """What surrounds an artefact's network, on its device: the base's text encoder, and its VAE where the artefact has
    none of its own."""
    components = ("vae", "text_encoder") if artefact.vae is None else ("text_encoder",)
    dtype = getattr(torch, artefact.manifest.encoder_precision)
    backbone = load_backbone(base, artefact.device, dtype, components)
    if artefact.vae is not None:
        backbone.use_vae_graphs(*artefact.vae)
    return backbone


def check_fit(folder: Path, manifest: Manifest) -> Catalogue:
    """The catalogue of an artefact that fits its own schedule and this machine; `InputError` for others."""
    try:
        catalogue = Catalogue.model_validate(manifest.catalogue)
    except ValidationError as error:
        raise InputError(f"{folder}: its manifest holds no catalogue that this clora reads; export again") from error
    check_schedule(folder, manifest, catalogue)
    check_machine(folder, manifest)
    return catalogue


def check_schedule(folder: Path, manifest: Manifest, catalogue: Catalogue) -> None:
    """Raise `InputError` where the manifest's schedule or sampler is not its catalogue's."""
    has = (manifest.num_steps, manifest.shift, manifest.sampler)
    wants = (catalogue.schedule.num_steps, catalogue.schedule.shift, catalogue.sampler)
    if has != wants:
        raise InputError(
            f"{folder}: is for {has[0]} steps with shift {has[1]:g} ({has[2]}), its catalogue for {wants[0]} with shift"
            f" {wants[1]:g} ({wants[2]}); export again"
        )


def check_sampling(folder: Path, manifest: Manifest, num_steps: int | None, guidance: float | None) -> None:
    """Raise `InputError` where an edit asks for another number of steps than the artefact is for, or for guidance."""
    own = manifest.num_steps
    if num_steps is not None and num_steps != own:
        raise InputError(
            f"steps: {folder} holds the modulation of {own} steps (shift {manifest.shift:g}), not of {num_steps}; leave"
            f" --steps out, or export a collection distilled for {num_steps}"
        )
    if guidance is not None and guidance != 1:
        raise InputError(f"guidance: {folder} samples without it, {guidance:g} was given; leave it out")


def check_base(folder: Path, manifest: Manifest, base: str) -> None:
    """Raise `InputError` for another base than the artefact was exported from: its encoders would not fit."""
    if base_identity(base, None) != manifest.base_identity:
        raise InputError(f"base {base}: is not what {folder} was exported from; give that one with --base")


def check_machine(folder: Path, manifest: Manifest) -> None:
    """Raise `InputError` for native code of another torch or another kind of CPU."""
    if (manifest.format == "tensorrt") != (manifest.engine is not None):
        raise InputError(f"{folder}: its manifest does not say what engine it holds; export again")
    if manifest.format != "aoti":
        return
    for what, made, here in (
        ("torch", manifest.versions.get("torch"), str(torch.__version__)),
        ("the CPU", manifest.platform, machine()),
    ):
        if made != here:
            raise InputError(f"{folder}: was compiled for {what} {made}, this is {here}; export again on this machine")


def why_unmeasured(manifest: Manifest) -> str | None:
    """Why an artefact that is whole cannot run on this machine, in half a sentence; None where it should."""
    if manifest.format == "onnx" and not has_runtime():
        return "onnxruntime is not installed"
    return None if manifest.engine is None else why_not_here(manifest.engine)


def machine() -> str:
    """System, processor and vector instructions: what native code is compiled for."""
    return f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def library_versions() -> dict[str, str]:
    """The versions of the libraries that make or run artefacts, of those that are installed."""
    found: dict[str, str] = {"torch": str(torch.__version__)}
    for name in LIBRARIES:
        try:
            found.setdefault(name, version(name))
        except PackageNotFoundError:
            continue
    return found


def _open(folder: Path, manifest: Manifest, base: str, device: torch.device) -> GraphVelocity | Backbone:
    if manifest.format == "merged":
        backbone = load_backbone(folder, device, manifest.dtype, ("transformer",))
        backbone.use_kernels("auto")
        return backbone
    run: Run
    if manifest.engine is not None:
        run = open_engine(folder, manifest.engine, device)
    else:
        run = open_aoti(folder) if manifest.format == "aoti" else open_onnx(folder)
    return _graph_velocity(run, folder, manifest, base)


def _graph_velocity(run: Run, folder: Path, manifest: Manifest, base: str) -> GraphVelocity:
    positions = partial(rotary_positions, base)
    own = (manifest.num_steps, manifest.shift, manifest.limits, manifest.dtype)
    return GraphVelocity(run, str(folder), positions, *own)
