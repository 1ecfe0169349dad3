"""The student's losses as one sum, for tests that look at a whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from clora.method.objective import Loss, c2f_do_loss_terms, total_loss_terms


def summed(terms: Iterable[Loss]) -> Loss:
    """The sum of the terms with its graph, and all their figures."""
    losses, figures = [], {}
    for loss, of_term in terms:
        losses.append(loss)
        figures |= of_term
    return torch.stack(losses).sum(), figures


def total_loss(*given: Any) -> Loss:
    """Eq. 9, with the figure that a step logs of it."""
    loss, figures = summed(total_loss_terms(*given))
    return loss, {"total_loss": loss.detach(), **figures}


def c2f_do_loss(*given: Any) -> Loss:
    """Eq. 8."""
    return summed(c2f_do_loss_terms(*given))
