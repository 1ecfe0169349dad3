"""Edits with an artefact: the request that it stands for, and an `Editor` that runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clora.errors import InputError, raise_faults
from clora.export.artefact import base_of, check_sampling, device_of, open_artefact, open_encoders
from clora.export.manifest import COLLECTION, read_manifest
from clora.inference.edit_plan import EditRequest
from clora.inference.editor import Editor
from clora.inference.sampling import few_step_sampling


def artefact_request(request: EditRequest, folder: Path, key: Path | None = None) -> EditRequest:
    """The request with what the artefact in `folder` decides: base and collection, steps, precision, device.

    Only its manifest is read. Raises `InputErrors` with every option that an artefact has no choice of.
    """
    manifest = read_manifest(folder, key)
    faults = [
        f"{name}: is the artefact's own, {folder} cannot take another; leave it out"
        for name, given in (("lora", request.lora), ("dtype", request.dtype))
        if given is not None
    ]
    if request.batch_size > manifest.limits.batch:
        faults.append(f"batch_size: {folder} takes {manifest.limits.batch} at most; make it smaller")
    try:
        device = device_of(folder, manifest, request.device)
    except InputError as error:
        faults += error.faults
    raise_faults(faults)
    check_sampling(folder, manifest, request.steps, request.guidance)
    return replace(
        request,
        base=base_of(folder, manifest, request.base),
        lora=folder / COLLECTION,
        steps=None,
        guidance=None,
        device=str(device),
        dtype=manifest.encoder_precision,
    )


def artefact_editor(folder: Path, base: str, key: Path | None = None, device: str | None = None) -> Editor:
    """The artefact in `folder`, checked and opened, between the encoders and the decoder of `base`."""
    artefact = open_artefact(folder, base, key, device)
    backbone, manifest = open_encoders(artefact, base), artefact.manifest
    sampling = few_step_sampling(manifest.num_steps, manifest.shift, manifest.sampler)
    return Editor(backbone, artefact.catalogue, sampling, has_lora=True, velocity=artefact.velocity)
