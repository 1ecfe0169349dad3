"""A model opened for serving: an artefact's folder, or a base and a collection merged in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from clora.backbones.load import choose_device, linear_shapes, load_backbone, rotary_positions, served_network
from clora.config import collection_lora, resolve_base
from clora.errors import InputError
from clora.export.artefact import base_of, open_artefact, open_encoders
from clora.export.graph import run_on
from clora.export.graph_velocity import GraphVelocity
from clora.export.manifest import COLLECTION, LIMITS, read_manifest
from clora.inference.batching import Served, StepBatcher
from clora.io.digest import file_digest
from clora.lora.catalogue import Catalogue, read_catalogue
from clora.lora.files import read_lora
from clora.lora.groups import read_groups
from clora.lora.merge import merge_weight_once
from clora.method.flow import few_step_sigmas
from clora.serve.models import Encoders, Parts
from clora.serve.offer import Collection, Effect, Offer
from clora.serve.settings import Settings

OpenEncoders = Callable[[str, torch.device, torch.dtype], Encoders]


def open_models(settings: Settings) -> dict[str, Parts]:
    """The models that the settings name, by name: one, or one for each group of a groups file, called NAME-1, NAME-2 in
    its order. Collections of the same base share its encoders; each has a network of its own.

    Raises as `open_model`, and `InputError` for a file that does not hold the effects that its group names.
    """
    if settings.groups is None:
        return {settings.name: open_model(settings)}
    if settings.artefact is not None or settings.collection is not None:
        raise InputError("groups: names the collections; leave artefact and collection out")
    groups, share = read_groups(settings.groups), cache(_open_encoders)
    found = {}
    for number, group in enumerate(groups.groups, 1):
        path = settings.groups.parent / group.collection
        change = {
            "groups": None,
            "name": f"{settings.name}-{number}",
            "base": settings.base or groups.base,
            "artefact" if path.is_dir() else "collection": path,
        }
        parts = open_model(settings.model_copy(update=change), share)
        if missing := set(group.effects) - set(parts.offer.collection.effects):
            raise InputError(f"{path}: lacks {', '.join(sorted(missing))}, which {settings.groups} says it has")
        found[parts.offer.name] = parts
    return found


def open_model(settings: Settings, encoders: OpenEncoders | None = None) -> Parts:
    """The model that the settings name: an artefact, else a collection, else the collection that the base brings along.

    A collection is merged into its base in memory, on `device` in `dtype` (as `clora edit` chooses them), between the
    `encoders` of the base; an artefact runs in its own precision, on a device that it was made for. Raises `InputError`
    as `open_artefact`, `read_lora` and `load_backbone` do.
    """
    if settings.artefact is not None and settings.collection is not None:
        raise InputError("artefact and collection are both given; serve one of them")
    if settings.signed_by is not None and settings.artefact is None:
        raise InputError("signed_by: only an artefact is signed; name one, or leave it out")
    if settings.artefact is not None:
        return _open_artefact(settings, settings.artefact)
    base, collection = settings.base, settings.collection
    if collection is None:
        base = base or "tiny"
        collection = collection_lora(base)
        if collection is None:
            raise InputError(f"base {base}: brings no collection along; name one, or an artefact's folder")
    return _open_merged(settings, base, collection, encoders or _open_encoders)


def _open_artefact(settings: Settings, folder: Path) -> Parts:
    if settings.dtype is not None:
        raise InputError(f"dtype: is the artefact's own, {folder} cannot take another; leave it out")
    manifest = read_manifest(folder, settings.signed_by)
    base = base_of(folder, manifest, settings.base)
    artefact = open_artefact(folder, base, settings.signed_by, settings.device)
    found = _collection(artefact.catalogue, file_digest(folder / COLLECTION).hex())
    own = Encoders(open_encoders(artefact, base))
    return Parts(_offer(settings, found, own), own, _starter(artefact.served(), settings), _places(folder, base))


def _open_encoders(base: str, device: torch.device, dtype: torch.dtype) -> Encoders:
    return Encoders(load_backbone(base, device, dtype, ("vae", "text_encoder")))


def _open_merged(settings: Settings, base: str | None, collection: Path, encoders: OpenEncoders) -> Parts:
    catalogue = read_catalogue(collection)
    base = base or catalogue.base
    device = choose_device(settings.device)
    precision = settings.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    dtype = getattr(torch, precision)
    schedule = catalogue.schedule
    sigmas = few_step_sigmas(schedule.num_steps, schedule.shift)
    network = _merged_network(base, collection, device, dtype, sigmas)
    positions = partial(rotary_positions, base)
    run = run_on(network, device)
    graph = GraphVelocity(run, str(collection), positions, schedule.num_steps, schedule.shift, LIMITS, dtype)
    served = Served(graph.run, graph.conditions, sigmas, catalogue.sampler, dtype, LIMITS.batch)
    around = encoders(base, device, dtype)
    found = _collection(catalogue, file_digest(collection).hex())
    return Parts(_offer(settings, found, around), around, _starter(served, settings), _places(collection, base))


@torch.no_grad()
def _merged_network(base: str, collection: Path, device: torch.device, dtype: torch.dtype, sigmas: Tensor) -> nn.Module:
    """The base's transformer with the collection in its weights, summed in fp32 and rounded once."""
    modules = read_lora(collection, linear_shapes(base)).modules
    backbone = load_backbone(base, device, dtype, ("transformer",))
    for name, module in modules.items():
        weight = backbone.transformer.get_parameter(f"{name}.weight")
        on_device = replace(module, A=module.A.to(device), B=module.B.to(device))
        weight.copy_(merge_weight_once(weight, on_device, dtype)[0])
    return served_network(backbone, sigmas)


def _collection(catalogue: Catalogue, digest: str) -> Collection:
    effects = {entry.name: Effect(entry.name, entry.trigger, entry.prompt) for entry in catalogue.effects}
    schedule = catalogue.schedule
    return Collection(catalogue.base, digest, effects, schedule.num_steps, schedule.shift, catalogue.sampler)


def _offer(settings: Settings, collection: Collection, encoders: Encoders) -> Offer:
    height, width = encoders.backbone.output_size()
    unit = height // encoders.backbone.grid((height, width))[0]
    return Offer(settings.name, collection, unit, settings.limits.result_pixels or height * width)


def _starter(served: Served, settings: Settings) -> Callable[[], StepBatcher]:
    batches = settings.batches
    return lambda: StepBatcher(served, max_batch=batches.denoise, max_queue=batches.max_queue)


def _places(path: Path, base: str) -> tuple[str, ...]:
    """What errors may say of files, the longest first."""
    resolved = resolve_base(base)
    found = {str(path), str(path.absolute()), *([str(resolved)] if isinstance(resolved, Path) else [])}
    return tuple(sorted(found, key=len, reverse=True))
