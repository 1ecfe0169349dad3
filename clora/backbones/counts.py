"""What can be counted of a base that is not open, from its configuration: the Protocol `Footprint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ForwardSize:
    """One forward, as numbers: its samples, the tokens of each, bytes of one number, the rank of adapters in use."""

    batch_size: int
    image_tokens: int
    reference_tokens: int
    text_tokens: int
    itemsize: int
    rank: int = 0

    @property
    def tokens(self) -> int:
        """T of one sample: image, references and text."""
        return self.image_tokens + self.reference_tokens + self.text_tokens


class Footprint(Protocol):
    """Sizes of a base from its configuration alone. Counts are of numbers, memory is in bytes of tensors."""

    @property
    def num_layers(self) -> int:
        """Blocks of the transformer."""

    @property
    def num_parameters(self) -> int:
        """Of the transformer."""

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(N, K) of the transformer's linears by module name: what a LoRA file is held against."""

    @property
    def block_linears(self) -> list[tuple[int, int]]:
        """(N, K) of the linears of all blocks."""

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The linears that an adapter covers where nobody says which, as suffixes of module names."""

    @property
    def pixels_per_token(self) -> int:
        """Pixels along one side of a token."""

    @property
    def reference_tokens(self) -> int:
        """Tokens of one reference image at the size at which the transformer sees it."""

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of a LoRA of this rank on the linears whose names end in a target."""

    def saved_by_block(self, forward: ForwardSize) -> int:
        """What autograd keeps of one block's forward, adapters on the default targets."""

    def saved_by_recomputed_block(self, forward: ForwardSize) -> int:
        """What stays of it where the block is recomputed in the backward pass."""

    def saved_outside_blocks(self, forward: ForwardSize) -> int:
        """What autograd keeps of the layers before and behind the blocks."""

    def forward_workspace(self, forward: ForwardSize) -> int:
        """Most that is alive in a forward without grad, beyond its inputs."""

    def backward_workspace(self, forward: ForwardSize) -> int:
        """Most that a block's backward takes beyond what its forward kept."""
