from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

class AotiEngine:
    def __init__(self, package: str) -> None: ...
    def __call__(
        self, x: Tensor, refs: Tensor, text: Tensor, cos: Tensor, sin: Tensor, step: Tensor, text_len: Tensor
    ) -> Tensor: ...

class QueueFull(Exception): ...

class Batcher:
    def __init__(
        self,
        engine: AotiEngine | Callable[..., Tensor],
        sigmas: Tensor,
        sampler: str,
        dtype: torch.dtype,
        max_batch: int,
        max_queue: int,
    ) -> None: ...
    def submit(
        self,
        bucket: int,
        noise_TC: Tensor,
        refs_RC: Tensor,
        text_MD: Tensor,
        cos: Tensor,
        sin: Tensor,
        text_len: int,
        generator: Generator,
        effect: str,
        timeout: float | None,
        on_step: Callable[[int, int], None] | None,
        on_done: Callable[[str, Tensor | None, str], None],
    ) -> int: ...
    def cancel(self, ticket: int) -> bool: ...
    def stats(self) -> dict[str, float]: ...
    def close(self, drain: bool, timeout: float | None) -> None: ...

def sample_engine(
    engine: AotiEngine | Callable[..., Tensor],
    noise_BTC: Tensor,
    refs_BRC: Tensor,
    text_BMD: Tensor,
    cos: Tensor,
    sin: Tensor,
    text_len: Tensor,
    generators: Sequence[Generator],
    sigmas: Tensor,
    sampler: str = "consistency",
    dtype: torch.dtype = ...,
    on_step: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor: ...
def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise_BTC: Tensor,
    generators: Sequence[Generator],
    sigmas: Tensor,
    on_step: Callable[[int, float, Tensor], None] | None = None,
    sampler: str = "consistency",
) -> Tensor: ...
