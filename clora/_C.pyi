from collections.abc import Callable, Sequence

from torch import Generator, Tensor

def consistency_sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise_BTC: Tensor,
    generators: Sequence[Generator],
    sigmas: Tensor,
    on_step: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor: ...
