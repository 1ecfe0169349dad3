"""The build backend of pyproject.toml: scikit-build-core, plus one answer that only the environment can give.

`clora._C` is compiled against the headers of one torch and must run with that same torch. When the
environment that is being installed into has a torch that clora accepts, the build uses it (CMakeLists.txt
finds it also from inside pip's isolated build environment) and none is fetched. Otherwise torch is a
requirement of the build, as it is of the package.
"""

from __future__ import annotations

import subprocess
import sys

from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403  (every hook; the two below are replaced)

OLDEST_TORCH = (2, 11)  # as `dependencies` in pyproject.toml says


def _torch_requirement() -> list[str]:
    """[] when the surrounding environment holds a torch to build against, otherwise the requirement."""
    # -E leaves out PYTHONPATH, through which pip puts its isolated environment in front of the real one.
    query = "import importlib.metadata as m; print(m.version('torch'))"
    found = subprocess.run([sys.executable, "-E", "-c", query], capture_output=True, text=True)
    if found.returncode == 0:
        major, minor = found.stdout.split(".")[:2]
        if (int(major), int(minor)) >= OLDEST_TORCH:
            return []
    return ["torch>=" + ".".join(map(str, OLDEST_TORCH))]


def get_requires_for_build_wheel(config_settings: dict[str, list[str] | str] | None = None) -> list[str]:
    return [*build.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: dict[str, list[str] | str] | None = None) -> list[str]:
    return [*build.get_requires_for_build_editable(config_settings), *_torch_requirement()]
