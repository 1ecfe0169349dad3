"""Several processes that train together. torchrun starts them; one process alone needs nothing of this.

What the processes must agree on goes through collectives (nccl on GPUs, gloo on CPUs). What one of them does alone and
others wait for, however long it takes (encoding, writing a checkpoint), goes through torchrun's key-value store, which
has no time limit and may be used from another thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from clora.errors import InputError, ProcessLost, first_line

_POLL_SECONDS = 0.05
_store: Store | None = None
_meetings = 0
_groups = 0

# torch 2.13 renamed both.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def rank() -> int:
    """This process's number, 0 .. world_size() - 1, as torchrun says; 0 for one that was started alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and progress."""
    return rank() == 0


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[None]:
    """Join the processes that torchrun started, for the time inside; nothing happens for one process alone.

    Under CUDA the process takes the GPU of its local rank. A collective that waits longer than `timeout_seconds`
    raises. Does not nest.
    """
    global _store, _meetings, _groups
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"process {local} of this machine has no GPU of its own; start {gpus} (--nproc_per_node)")
        torch.cuda.set_device(local)
    if world_size() == 1:
        yield
        return
    timeout = timedelta(seconds=timeout_seconds)
    with guard("start"):
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        _groups += 1  # torchrun's store outlives a group
        _store, _meetings = PrefixStore(f"clora/{_groups}", store), 0
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        dist.init_process_group(
            "gloo" if device is None else "nccl",
            store=PrefixStore(f"group/{_groups}", store),
            rank=rank(),
            world_size=world_size(),
            timeout=timeout,
            device_id=device,
        )
    yield
    # Not after an error: the others may be gone, and this would wait for them.
    barrier()
    leave_together()
    dist.destroy_process_group()
    _store = None


@contextmanager
def guard(where: str) -> Iterator[None]:
    """Turn what collectives and store raise when a process is gone or late into `ProcessLost` naming `where`."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise ProcessLost(
            f"process {rank()} of {world_size()} at {where}: another process died or hangs ({reason[:200]});"
            " its own message, or torchrun's, says why; go on with --resume latest"
        ) from error


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_figures(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """0-d tensors by name, each summed over all processes; every process must have the same names."""
    if world_size() == 1 or not figures:
        return dict(figures)
    summed = sum_over_processes(torch.stack([figures[name].float() for name in sorted(figures)]))
    return dict(zip(sorted(figures), summed.unbind(), strict=True))


def max_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each number over all processes (fp64)."""
    if world_size() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    found: list[float] = numbers.tolist()
    return found


def reduce_scatter(own: Tensor, whole: Tensor) -> None:
    """`own` (n,) becomes this process's part of the sum of `whole` (world n,) over all processes."""
    _reduce_scatter(own, whole)


def all_gather(whole: Tensor, own: Tensor) -> None:
    """`whole` (world n,) becomes the `own` (n,) of all processes, in the order of their ranks."""
    _all_gather(whole, own)


def gather_texts(text: str) -> list[str]:
    """Every process's text, by rank."""
    if world_size() == 1:
        return [text]
    texts: list[str] = [""] * world_size()
    dist.all_gather_object(texts, text)
    return texts


def from_main(text: str | None) -> str | None:
    """The main process's text, on every process."""
    if world_size() == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shard(module: nn.Module, blocks: Sequence[nn.Module], offload: bool = False) -> tuple[int, int]:
    """Split the frozen weights of a module over the processes (FSDP2): each keeps its part, and a block's weights are
    put together just before it runs, those of the next one meanwhile.

    Parameters added afterwards stay whole on every process. All processes must then run the same forwards. Weights may
    lie on the CPU: a block at a time goes to the process's GPU. With `offload` a process's part stays in CPU memory and
    is copied to its GPU each time. Returns the bytes of all weights and of this process's.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        OffloadPolicy,
        fully_shard,
    )  # half a second that only this takes
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(module, mesh=mesh, offload_policy=policy)
    for before, after in zip(blocks, blocks[1:], strict=False):
        before.set_modules_to_forward_prefetch([after])  # type: ignore[operator]
        after.set_modules_to_backward_prefetch([before])  # type: ignore[operator]
    weights = [p for p in module.parameters() if isinstance(p, DTensor)]
    return sum(p.nbytes for p in weights), sum(p.to_local().nbytes for p in weights)


def barrier() -> None:
    """Wait until every process has come here, however long that takes."""
    global _meetings
    if _store is None:
        return
    key = f"meeting/{_meetings}"
    _meetings += 1
    with guard("a meeting of all processes"):
        if _store.add(f"{key}/arrived", 1) == world_size():
            _store.set(f"{key}/all", "1")
        wait_for([f"{key}/all"])


def leave_together() -> None:
    """Wait for the others at the end: the store may be kept by the first process, and all must have read it."""
    if world_size() > 1:
        with guard("the end"):
            dist.barrier()


def post(key: str, text: str) -> None:
    """Leave a text for the other processes."""
    assert _store is not None
    _store.set(key, text)


def wait_for(keys: Sequence[str]) -> list[str]:
    """The texts under `keys`, once all of them were posted."""
    assert _store is not None
    # `Store.wait` would hold the connection, which other threads of this process use.
    while not _store.check(list(keys)):
        time.sleep(_POLL_SECONDS)
    return [_store.get(key).decode() for key in keys]
