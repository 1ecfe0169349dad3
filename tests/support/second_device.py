"""A second device on a machine without one: `use()` makes `torch.device("second")` of this process.

Its tensors hold their values in memory, and are refused beside the CPU's as a GPU's are: in one operation (but for
scalars and indices), by `numpy()`, and by what is written in C++. So what was left on the wrong device shows, and what
a model makes there can be compared, value by value, with what it makes on the CPU. Of a GPU's arithmetic, kernels and
streams it knows nothing. There is no way back: use it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
LIBRARY, ATEN = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
COPIES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
INDEXED = ("aten::index", "aten::_index_put")  # by indices of either device
SIZED_LATER = ("arange", "linspace")  # factories that give a tensor its size after they have made it


class There(Tensor):
    """A tensor on the second device; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
        )
        made.here = here
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, *args, **(kwargs or {}))

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: There) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.here = value.here

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def tolist(self) -> Any:
        return self.here.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here})"


class Generator(torch.Generator):
    """Of the second device by what it says, and of the CPU by what it draws."""

    @staticmethod
    def __new__(cls, device: Any = "cpu") -> Generator:
        made: Generator = super().__new__(cls)
        made.named = torch.device(device)
        return made

    named: torch.device

    @property
    def device(self) -> torch.device:
        return self.named


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation with tensors of the second device among its arguments, or that makes some."""
    given, tree = pytree.tree_flatten((args, kwargs))
    there = [one for one in given if isinstance(one, There)]
    here = [one for one in given if isinstance(one, Tensor) and not isinstance(one, There)]
    name = op._schema.name
    if there and any(one.dim() for one in here) and name not in COPIES and not name.startswith(INDEXED):
        raise RuntimeError(f"{op}: expected all tensors on one device, found {NAME} and cpu")
    device = next((one for one in given if isinstance(one, torch.device)), None)
    to_here = [_to_here(one) for one in given]
    own_args, own_kwargs = pytree.tree_unflatten(to_here, tree)
    made = op(*own_args, **own_kwargs)
    if device is not None:
        stays = device.type == NAME
    else:
        stays = isinstance(args[0], There) if name == "aten::copy_" else bool(there)
    known = {id(one.here): one for one in there}  # an operation in place gives what it was given

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        if id(one) in known:
            return known[id(one)]
        # A wrapper cannot say that its values are to be read as their conjugates.
        return There(one.resolve_conj()) if stays else one

    return pytree.tree_map(wrapped, made)


def _to_here(one: Any) -> Any:
    if isinstance(one, torch.device):
        return torch.device("cpu")
    return one.here if isinstance(one, There) else one


def use() -> None:
    """Make the device, and let what chooses a device for itself choose it."""
    _setup_privateuseone_for_python_backend(NAME)
    LIBRARY.fallback(run, "PrivateUse1")
    # The fallback does not see what `torch.tensor` and lists of indices ask for.
    for name in ("_to_copy", "_local_scalar_dense"):
        ATEN.impl(name, partial(run, getattr(torch.ops.aten, name).default), "PrivateUse1")
    for name in SIZED_LATER:
        setattr(torch, name, _made_here_first(getattr(torch, name)))
    torch.Generator = Generator  # type: ignore[misc]
    from clora.distill import workspace
    from clora.jobs import eval_bench

    for module in (workspace, eval_bench):
        module.pick_device = pick_device  # type: ignore[attr-defined]


def pick_device() -> torch.device:
    """As `clora.training.device`'s, and says so in the process's output."""
    print(f"on {NAME}", flush=True)
    return torch.device(NAME, 0)


def _made_here_first(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        found = factory(*args, **kwargs)
        return found if device is None else found.to(device)

    return made
