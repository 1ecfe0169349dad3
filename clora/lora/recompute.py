"""Activation checkpointing of blocks with adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from clora.lora.slots import SlotChoice


def checkpoint_fn(choice: SlotChoice, keep: Sequence[Any] = (), whole: Sequence[nn.Module] = ()) -> Callable[..., Any]:
    """A `gradient_checkpointing_func` for diffusers whose recomputation sees the forward's `choice` of slots.

    The backward pass usually runs after `use` was left (and on another thread on CUDA); without this the
    blocks would be recomputed as the base. What the operators in `keep` gave is kept and not computed again; such a
    graph can be walked only once. Modules in `whole` keep everything.
    """
    not_again = {id(module) for module in whole}

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        again = _SamePlan(choice)
        if not keep:
            return nullcontext(), again
        keeping, kept = create_selective_checkpoint_contexts(list(keep))
        return keeping, _both(again, kept)

    def run(module: nn.Module, *args: Any) -> Any:
        if id(module) in not_again:
            return module(*args)
        # No random numbers are drawn in a frozen base without dropout, so their state need not be kept.
        return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return run


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


class _SamePlan(AbstractContextManager[None]):
    """Restores the plan of its making; may be entered again, for a graph that is walked twice."""

    def __init__(self, choice: SlotChoice) -> None:
        self.choice, self.plan, self.before = choice, choice.plan, choice.plan

    def __enter__(self) -> None:
        self.before, self.choice.plan = self.choice.plan, self.plan

    def __exit__(self, *_: object) -> None:
        self.choice.plan = self.before
