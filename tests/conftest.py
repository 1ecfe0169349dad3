"""What every test runs under: one thread, no network, and no GPU test where there is no GPU."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Two spinning OpenMP threads on a busy machine slow a test a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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


# What a process of the suite may use at most, so that two of them run on a laptop beside its user's own work.
MOST_GB = 4.0
GREW = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if (big := item.get_closest_marker("big")) and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason=f"needs {big.args[0]:g} GB of memory; CI=1 runs it"))


def pytest_collection_finish() -> None:
    """All that was imported stays. Left out of them, collections of garbage, which every training begins with, take
    milliseconds in place of a third of a second."""
    gc.freeze()


def peak_gb() -> float:
    """The most memory that this process, or any process that it started and that has ended, has had at a time."""
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere


@pytest.fixture(autouse=True)
def memory_bar(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that takes its process past MOST_GB, unless it is marked `big`.

    A peak stays: after one such test, or a big one, the process is not asked again.
    """
    yield
    peak = peak_gb()
    if peak > MOST_GB and not request.config.stash.get(GREW, False):
        request.config.stash[GREW] = True
        if request.node.get_closest_marker("big") is None:
            pytest.fail(f"its process came to {peak:.1f} GB of {MOST_GB:g}: make it smaller, or mark it big(GB)", False)


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
