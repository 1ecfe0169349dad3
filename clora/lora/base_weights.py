"""The linear weights of a base on disk, one at a time, for updates that cannot be told without them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from clora.errors import InputError
from clora.io.safetensors import Header, TensorEntry, map_tensors, read_header


@dataclass(frozen=True)
class BaseWeights:
    """Weights of linear layers by module name; `shapes` are (N, K), as `check_lora` takes them."""

    places: dict[str, tuple[Path, str, TensorEntry]]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (entry.shape[0], entry.shape[1]) for name, (_, _, entry) in self.places.items()}

    def weight(self, name: str) -> Tensor:
        """(N, K) as a view of its file."""
        path, key, entry = self.places[name]
        return map_tensors(path, Header({key: entry}, {}, entry.end))[key]


def find_base_weights(folder: Path) -> BaseWeights:
    """The weights in the safetensors files of a model folder's `transformer` (or of the folder itself).

    Only headers are read. Raises `InputError` for a folder without such files.
    """
    inner = folder / "transformer"
    paths = sorted((inner if inner.is_dir() else folder).glob("*.safetensors"))
    places = {
        key.removesuffix(".weight"): (path, key, entry)
        for path in paths
        for key, entry in read_header(path).tensors.items()
        if key.endswith(".weight") and len(entry.shape) == 2
    }
    if not places:
        raise InputError(f"base {folder}: no safetensors weights in it or in transformer/; give a diffusers folder")
    return BaseWeights(places)
