"""An artefact opened: its velocity, at the noise levels of its schedule.

Shape legend: B batch, T image tokens, C latent channels per token, L text tokens, D text width, M a text bucket.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from clora.backbones.base import Backbone
from clora.backbones.cond import Cond
from clora.backbones.load import load_backbone, rotary_positions, served_network
from clora.config import base_identity
from clora.errors import InputError
from clora.export.aoti import open_aoti
from clora.export.graph import Run
from clora.export.manifest import Manifest, check_folder
from clora.export.onnx_graph import open_onnx
from clora.inference.batching import Conditions, Served
from clora.lora.catalogue import Catalogue
from clora.method.flow import Velocity, few_step_sigmas

LIBRARIES = ("clora", "diffusers", "numpy", "onnx", "onnxruntime", "torch", "transformers")


@dataclass(frozen=True, eq=False)
class Artefact:
    """`velocity` is (x (B, T, C), sigma (B,), cond) -> (B, T, C), as `Backbone.velocity` without slots."""

    folder: Path
    manifest: Manifest
    catalogue: Catalogue
    opened: GraphVelocity | Backbone

    @property
    def velocity(self) -> Velocity:
        return self.opened if isinstance(self.opened, GraphVelocity) else self.opened.velocity

    def served(self) -> Served:
        """The network for a `StepBatcher`. Of a merged artefact it is the one that graphs are made of, eager, over the
        same weights: what shares a batch must differ in step and text length alone."""
        graph, manifest = self.opened, self.manifest
        sigmas = few_step_sigmas(manifest.num_steps, manifest.shift)
        if not isinstance(graph, GraphVelocity):
            network = served_network(graph, sigmas)
            graph = GraphVelocity(network, self.folder, str(self.folder), manifest, graph.dtype)
        return Served(
            graph.run, graph.conditions, sigmas, manifest.sampler, graph.dtype, most_batch=manifest.limits.batch
        )


def open_artefact(folder: Path, base: str | None = None) -> Artefact:
    """Check every file of an artefact, then open it on the CPU. `base` says where its base is now, None: where it was.

    Raises `InputErrors` as `check_folder` does, and `InputError` for one that was made for another machine or torch;
    nothing of the folder is loaded before that.
    """
    return open_files(folder, check_folder(folder), base)


def open_files(folder: Path, manifest: Manifest, base: str | None = None) -> Artefact:
    """`open_artefact` for files that are known to be what `manifest` says; raises as it does for the rest."""
    try:
        catalogue = Catalogue.model_validate(manifest.catalogue)
    except ValidationError as error:
        raise InputError(f"{folder}: its manifest holds no catalogue that this clora reads; export again") from error
    check_schedule(folder, manifest, catalogue)
    check_machine(folder, manifest)
    return Artefact(folder, manifest, catalogue, _open(folder, manifest, base or manifest.base))


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
    if manifest.format != "aoti":
        return
    for what, made, here in (
        ("torch", manifest.versions.get("torch"), str(torch.__version__)),
        ("the CPU", manifest.platform, machine()),
    ):
        if made != here:
            raise InputError(f"{folder}: was compiled for {what} {made}, this is {here}; export again on this machine")


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


def _open(folder: Path, manifest: Manifest, base: str) -> GraphVelocity | Backbone:
    dtype = getattr(torch, manifest.precision)
    if manifest.format == "merged":
        backbone = load_backbone(folder, "cpu", dtype, ("transformer",))
        backbone.use_kernels("auto")
        return backbone
    run = open_aoti(folder) if manifest.format == "aoti" else open_onnx(folder)
    return GraphVelocity(run, folder, base, manifest, dtype)


@dataclass(eq=False)
class GraphVelocity:
    """A graph as a velocity: noise level -> step, text padded to its bucket, positions of the grids. `base` gives the
    positions."""

    run: Run
    folder: Path
    base: str
    manifest: Manifest
    dtype: torch.dtype
    _positions: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, x_BTC: Tensor, sigma_B: Tensor, cond: Cond) -> Tensor:
        """Raises `InputError` for a noise level that is not the schedule's, and for sizes beyond the limits."""
        batch, most = len(x_BTC), self.manifest.limits.batch
        if not 1 <= batch <= most:
            raise InputError(f"{self.folder}: a batch of {batch} is beyond its {most}; make it smaller")
        refs, text, cos, sin, lengths = self._inputs(x_BTC.shape[1], cond)
        step = self._steps(sigma_B.expand(batch))
        return self.run(x_BTC.to(self.dtype), refs, text, cos, sin, step, torch.tensor(lengths)).to(x_BTC.dtype)

    def conditions(self, cond: Cond) -> Conditions:
        """What the graph takes besides x and step, for a condition of batch 1; raises `InputError` for sizes beyond the
        limits."""
        refs, text, cos, sin, lengths = self._inputs(cond.grid[0] * cond.grid[1], cond)
        return Conditions(refs[0], text[0], cos, sin, lengths[0])

    def _inputs(self, tokens: int, cond: Cond) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...]]:
        """refs, text, cos, sin and the lengths of the texts, for a result of so many tokens."""
        text = self._bucketed(cond)
        self._check(tokens, cond)
        lengths = cond.text_lengths or (cond.text_BLD.shape[1],) * cond.batch_size
        grids = (cond.grid, *cond.ref_grids)
        key = (grids, text.shape[1])
        if (positions := self._positions.get(key)) is None:
            if len(self._positions) >= 64:
                self._positions.clear()
            positions = self._positions[key] = rotary_positions(self.base, grids, text.shape[1])
        return torch.cat(cond.refs, dim=1).to(self.dtype), text, *positions, lengths

    def _steps(self, sigma_B: Tensor) -> Tensor:
        """The number of each noise level in the schedule, int64 (B,)."""
        num_steps, shift = self.manifest.num_steps, self.manifest.shift
        found = sigma_B.float()[:, None] == few_step_sigmas(num_steps, shift)
        if not found.any(dim=1).all():
            odd = sigma_B[~found.any(dim=1)][0].item()
            raise InputError(
                f"{self.folder}: noise level {odd:.6g} is none of its {num_steps} (shift {shift:g}); sample by its own"
                " schedule"
            )
        return found.int().argmax(dim=1)

    def _bucketed(self, cond: Cond) -> Tensor:
        """Text (B, M, D) padded to the smallest bucket that holds it."""
        length, buckets = cond.text_BLD.shape[1], self.manifest.limits.text_buckets
        fitting = [bucket for bucket in buckets if bucket >= length]
        if not fitting:
            raise InputError(
                f"{self.folder}: a text of {length} tokens is longer than its {buckets[-1]}; shorten the prompt"
            )
        return F.pad(cond.text_BLD.to(self.dtype), (0, 0, 0, fitting[0] - length))

    def _check(self, tokens: int, cond: Cond) -> None:
        most, ref_tokens = self.manifest.limits.tokens, sum(ref.shape[1] for ref in cond.refs)
        for what, number in (("a result", tokens), ("references", ref_tokens)):
            if not 2 <= number <= most:
                raise InputError(f"{self.folder}: {what} of {number} tokens; it takes 2 to {most}: use other sizes")
