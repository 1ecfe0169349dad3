"""The part of Triton's gRPC protocol that clients of a decoupled model use, over the stand-in for its server.

Messages are those of Triton's own client, so that what it sends and reads is what a server would get and give.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from tests.support.triton_backend import InferenceRequest, InferenceResponse, Server, Tensor

KINDS = {"INT32": np.int32, "INT64": np.int64}


class Inference(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Streams of requests to one model; each is answered before the next is read."""

    def __init__(self, name: str, server: Server) -> None:
        self._name, self._server = name, server

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for asked in requests:
            assert asked.model_name == self._name
            contents = zip(asked.inputs, asked.raw_input_contents, strict=True)
            tensors = [Tensor(one.name, _array(one, content)) for one, content in contents]
            timeout = asked.parameters["timeout"].int64_param if "timeout" in asked.parameters else 0
            [sender] = self._server.send(InferenceRequest(tensors, timeout))
            context.add_callback(sender.cancel)
            yield _message(asked, sender.answer())


def _array(given: Any, content: bytes) -> Any:
    if given.datatype == "BYTES":
        return deserialize_bytes_tensor(content).reshape(given.shape)
    return np.frombuffer(content, KINDS[given.datatype]).reshape(given.shape).copy()


def _message(asked: Any, response: InferenceResponse) -> Any:
    if (error := response.error()) is not None:
        return service_pb2.ModelStreamInferResponse(error_message=error.message())
    made = service_pb2.ModelInferResponse(model_name=asked.model_name, model_version="1")
    for tensor in response.output_tensors():
        array = tensor.as_numpy()
        is_bytes = array.dtype == np.object_
        made.outputs.add(name=tensor.name(), datatype="BYTES" if is_bytes else "INT64", shape=array.shape)
        made.raw_output_contents.append(serialize_byte_tensor(array).item() if is_bytes else array.tobytes())
    return service_pb2.ModelStreamInferResponse(infer_response=made)


@contextmanager
def listening(name: str, server: Server) -> Iterator[str]:
    """The address of a server of one model on a free port of this machine."""
    found = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Inference(name, server), found)
    port = found.add_insecure_port("127.0.0.1:0")
    found.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        found.stop(None).wait()
