"""The noise levels at which a base's own pipeline samples it, from its `scheduler_config.json`.

diffusers' `FlowMatchEulerDiscreteScheduler` in closed form: a shift (`method.flow.shift_sigma`) that is fixed or grows
with the size of the image, and a last level that the others are stretched to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clora.errors import InputError
from clora.method.flow import few_step_sigmas

OTHER_SCHEDULES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


def base_sigmas(scheduler: Mapping[str, Any], num_steps: int, num_tokens: int) -> Tensor:
    """Noise levels, fp32 (num_steps,), falling from 1, for a result of `num_tokens` tokens; the final 0 is left out.

    `scheduler` is the configuration of the base's scheduler. Raises `InputError` for a schedule of another kind.
    """
    if others := [name for name in OTHER_SCHEDULES if scheduler.get(name)]:
        raise InputError(
            f"scheduler_config.json of the base: {others[0]} is not known here; give targets.shift a number"
        )
    sigmas = few_step_sigmas(num_steps, base_shift(scheduler, num_tokens))
    terminal = scheduler.get("shift_terminal")
    if not terminal or num_steps == 1:  # a single level is 1
        return sigmas
    clean = 1 - sigmas.double()
    stretched: Tensor = 1 - clean * ((1 - terminal) / clean[-1])
    return stretched.float()


def base_shift(scheduler: Mapping[str, Any], num_tokens: int) -> float:
    """The shift of `method.flow.shift_sigma` that a result of `num_tokens` tokens gets.

    A dynamic one lies on a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), and is
    its exponential where `time_shift_type` says so.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler["shift"])
    least, most = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    low, high = scheduler["base_shift"], scheduler["max_shift"]
    mu = low + (num_tokens - least) * (high - low) / (most - least)
    return math.exp(mu) if scheduler["time_shift_type"] == "exponential" else float(mu)
