"""What every test runs under: one thread, no network, and no GPU test where there is no GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Two spinning OpenMP threads on a busy machine slow a test a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import pytest
import torch
from hypothesis import settings

# Where there is no GPU the Triton kernels run in Triton's interpreter. It is chosen when triton is first imported, by
# whichever library does so, hence here and not in tests/kernels; nothing else uses Triton on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# A machine's load must not decide whether a property test passes, nor must chance.
settings.register_profile("clora", deadline=None, derandomize=True)
settings.load_profile("clora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if (big := item.get_closest_marker("big")) and not os.environ.get("CI"):
            if (reason := too_big(big.args[0], psutil.virtual_memory().available / 1e9)) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def too_big(needed_gb: float, available_gb: float) -> str | None:
    """Why a test that needs so much memory is left out: the suite runs on two processes, beside a user's own work."""
    if available_gb >= 2 * needed_gb:
        return None
    return (
        f"needs {needed_gb:g} GB of memory, {available_gb:.1f} are free of the {2 * needed_gb:g} wanted; CI=1 runs it"
    )


@pytest.fixture(autouse=True)
def default_attention() -> Iterator[None]:
    """diffusers keeps the attention last chosen for any model as that of every later one: give it back."""
    yield
    if (dispatch := sys.modules.get("diffusers.models.attention_dispatch")) is not None:  # it takes seconds to import
        default = dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND)
        dispatch._AttentionBackendRegistry.set_active_backend(default)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small base of random weights (`tests/support/random_base.py`), written once."""
    from tests.support.random_base import write_random_base

    return write_random_base(tmp_path_factory.mktemp("random_base"))
