"""A model repository of NVIDIA Triton beside an artefact: what `clora export --triton` writes, and `triton` serves.

    artefact/                                    what `clora export` wrote, and its manifest lists
    model_repository/artefact/config.pbtxt       what Triton reads
    model_repository/artefact/1/model.py         what Triton runs

It is beside the artefact and not in it, because Python writes `__pycache__` next to a model.py that it imports: a file
that no manifest lists, for which the artefact would be refused from the second start on. The two folders belong
together and move together, since the one names the other by a relative path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clora import __version__
from clora.errors import InputError
from clora.io.atomic import sync_folder, write_text

REPOSITORY = "model_repository"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
STRING, INT32, INT64 = "TYPE_STRING", "TYPE_INT32", "TYPE_INT64"
ANY = -1  # of a dimension: as many as are sent


@dataclass(frozen=True)
class Port:
    """An input or output: one dimension of `count` values."""

    name: str
    kind: str
    count: int
    optional: bool = False


# Names and meaning are those of the fields of an edit over HTTP. TYPE_STRING is Triton's name for bytes.
INPUTS = (
    Port("image", STRING, ANY),
    Port("effect", STRING, ANY, optional=True),
    Port("prompt", STRING, 1, optional=True),
    Port("seed", INT64, 1, optional=True),
    Port("n", INT32, 1, optional=True),
    Port("size", STRING, 1, optional=True),
)
OUTPUTS = (Port("pictures", STRING, ANY), Port("seeds", INT64, ANY), Port("made_by", STRING, 1))

MODEL = '''"""clora as a model of NVIDIA Triton, written by `clora export --triton`; see docs/SERVING.md."""

from clora import __version__

WRITTEN_BY = {version!r}

if __version__ != WRITTEN_BY:
    raise RuntimeError(
        f"model.py: is of clora {{WRITTEN_BY}}, installed is {{__version__}}; install the former, or export again"
    )

from clora.serve.triton import TritonPythonModel  # noqa: E402, F401
'''

CONFIG = """\
name: {name}
backend: "python"
max_batch_size: 0  # samples are put together step by step, by the model itself
version_policy {{ specific {{ versions: [ 1 ] }} }}
model_transaction_policy {{ decoupled: true }}
instance_group [ {{ count: 1 kind: KIND_MODEL }} ]  # all requests into one, which chooses its device
{ports}
{parameters}
"""


def model_folder(output: Path) -> Path:
    """Where the model of the artefact `output` belongs."""
    return output.parent / REPOSITORY / output.name


def check_model(output: Path) -> None:
    """Raise `InputError` where the artefact `output` cannot have a model beside it; nothing is made or changed."""
    folder = model_folder(output)
    if not NAME.fullmatch(output.name) or output.name == REPOSITORY:
        raise InputError(
            f"output: {output.name} cannot be a Triton model's name; use letters, digits, . _ and - (not {REPOSITORY})"
        )
    if os.path.lexists(folder):
        raise InputError(f"triton: {folder} is there already; name another --output, or remove it")


def write_model(folder: Path, output: Path, effects: Sequence[str]) -> None:
    """Write the model of the artefact `output`, which has those `effects`, into a new `folder`; files are synced."""
    parameters = {
        "artefact": f"../../{output.name}",
        "clora_version": __version__,
        "effects": json.dumps(list(effects)),
    }
    write_text(folder / "config.pbtxt", config_text(output.name, parameters))
    write_text(folder / "1" / "model.py", MODEL.format(version=__version__))
    sync_folder(folder / "1")


def config_text(name: str, parameters: dict[str, str]) -> str:
    """A model's configuration, in the text format of protobuf (`inference.ModelConfig`)."""
    ports = [_port("input", port) for port in INPUTS] + [_port("output", port) for port in OUTPUTS]
    values = ((_quoted(key), _quoted(value)) for key, value in parameters.items())
    pairs = [f"parameters {{ key: {key} value {{ string_value: {value} }} }}" for key, value in values]
    return CONFIG.format(name=_quoted(name), ports="\n".join(ports), parameters="\n".join(pairs))


def _port(kind: str, port: Port) -> str:
    optional = " optional: true" if port.optional else ""
    return f"{kind} [ {{ name: {_quoted(port.name)} data_type: {port.kind} dims: [ {port.count} ]{optional} }} ]"


def _quoted(text: str) -> str:
    """A string of the text format: whatever is not plain ASCII as octal bytes of UTF-8."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
