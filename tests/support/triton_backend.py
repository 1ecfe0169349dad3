"""What Triton's server is to a Python model: the module that it brings along, and the way it loads and calls a model.

After the documented API of its Python backend: `tests/serve/test_triton.py` puts this module in the place of
`triton_python_backend_utils`. What the server would not do, or not take, is an error here.
"""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    """What a model raises where it cannot be loaded."""


class TritonError:
    """A refusal: a message and a code."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    """A name and an array; bytes are an array of objects, because numpy's own type for them drops zeros at the end."""

    def __init__(self, name: str, array: Any) -> None:
        kinds = (np.dtype(np.object_), np.dtype(np.int64), np.dtype(np.int32))
        assert isinstance(array, np.ndarray) and array.dtype in kinds and array.flags.c_contiguous, array
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        assert self._array is not None, f"{self._name} is Triton's again"
        return self._array

    def take_back(self) -> None:
        """The memory is used for something else once `execute` has returned."""
        self._array[...] = b"" if self._array.dtype == np.object_ else -1
        self._array = None


class InferenceResponse:
    """Outputs, or an error."""

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        assert isinstance(output_tensors, list) and all(isinstance(one, Tensor) for one in output_tensors)
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class ResponseSender:
    """What a decoupled model answers one request through; `answer` and `cancel` are the client's side."""

    def __init__(self) -> None:
        self._done, self._cancelled = threading.Event(), threading.Event()
        self._response: InferenceResponse | None = None
        self.answered = 0.0  # time.monotonic()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert flags in (0, TRITONSERVER_RESPONSE_COMPLETE_FINAL), "Unable to send response. Unsupported flag provided."
        assert not self._done.is_set(), "Unable to send response. Response sender has been closed."
        assert response is not None and self._response is None, "these models send one response"
        self._response, self.answered = response, time.monotonic()
        if flags:
            self._done.set()

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def answer(self, seconds: float = 120) -> InferenceResponse:
        """The response, once it is final."""
        assert self._done.wait(seconds), "the request is not answered"
        assert self._response is not None
        return self._response


class InferenceRequest:
    """Inputs by name; `timeout` in microseconds, 0 for none."""

    def __init__(self, inputs: Sequence[Tensor], timeout: int = 0) -> None:
        self._inputs, self._timeout, self._sender = list(inputs), timeout, ResponseSender()

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def timeout(self) -> int:
        return self._timeout

    def get_response_sender(self) -> ResponseSender:
        return self._sender


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


class Server:
    """A model loaded as the server's stub does: model.py from its version's folder, then `initialize`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.config = config
        self._model = _import(folder / "1" / "model.py").TritonPythonModel()
        self._model.initialize(
            {
                "model_config": json.dumps(config),
                "model_instance_kind": "MODEL",
                "model_instance_name": f"{folder.name}_0",
                "model_instance_device_id": "0",
                "model_repository": str(folder),  # the model's own folder, whatever the name says
                "model_version": "1",
                "model_name": folder.name,
            }
        )

    @property
    def model(self) -> Any:
        return self._model

    def send(self, *requests: InferenceRequest) -> list[ResponseSender]:
        """One call of `execute`, after which the inputs' memory is taken back."""
        for request in requests:
            _check_request(request, self.config)
        assert self._model.execute(list(requests)) is None, "a decoupled model's execute must return None"
        for request in requests:
            for tensor in request.inputs():
                tensor.take_back()
        return [request.get_response_sender() for request in requests]

    def unload(self) -> None:
        self._model.finalize()


@contextmanager
def loaded(folder: Path, config: Mapping[str, Any]) -> Iterator[Server]:
    """A server that is unloaded at the end."""
    server = Server(folder, config)
    try:
        yield server
    finally:
        server.unload()


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_request(request: InferenceRequest, config: Mapping[str, Any]) -> None:
    """What the server refuses before a model sees it: inputs that the configuration lacks, or of another type."""
    kinds = {"TYPE_STRING": np.object_, "TYPE_INT32": np.int32, "TYPE_INT64": np.int64}
    known = {port["name"]: port for port in config["input"]}
    given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    for name, array in given.items():
        port = known[name]
        [count] = map(int, port["dims"])
        assert array.dtype == kinds[port["data_type"]] and array.ndim == 1 and count in (-1, len(array)), name
    missing = [name for name, port in known.items() if not port.get("optional") and name not in given]
    assert not missing, f"expected {missing}"
