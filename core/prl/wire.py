"""Messages on a wire: a msgpack header and the raw bytes of every column beside it.

    frame 0      [class name, fields], arrays replaced by {"@": frame, "dtype": ..., "shape": ...}
    frame 1..    the arrays' bytes, not copied on the way out

Nothing is pickled. `decode` accepts only the classes it is told to expect, structures them strictly and bounds their
size; anything else is a WireError with a reason. Connections are ZeroMQ sockets that authenticate with the run's token.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any, get_origin

import attrs
import cattrs
import msgpack
import numpy as np
import zmq
import zmq.asyncio

from prl.errors import InfrastructureError
from prl.run_dir import RunDir

MAX_MESSAGE_BYTES = 8 << 30
_DTYPES = {"int32", "int64", "float32", "bool", "uint8", "uint16"}
_USER = b"prl"


class WireError(InfrastructureError):
    """A message that is not what it should be."""


def encode(message: Any) -> list[bytes | memoryview]:
    """An attrs message as frames; arrays are sent from where they lie."""
    buffers: list[bytes | memoryview] = []
    header = [type(message).__name__, _lower(message, buffers)]
    return [msgpack.packb(header), *buffers]


def _lower(value: Any, buffers: list[bytes | memoryview]) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        buffers.append(memoryview(array).cast("B") if array.size else b"")
        return {"@": len(buffers), "dtype": str(array.dtype), "shape": list(array.shape)}
    if attrs.has(type(value)):
        return {a.name: _lower(getattr(value, a.name), buffers) for a in attrs.fields(type(value))}
    if isinstance(value, dict):
        return {k: _lower(v, buffers) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_lower(v, buffers) for v in value]
    if hasattr(value, "value") and hasattr(value, "name"):
        return value.value
    return value


def decode(frames: Sequence[Any], expected: Sequence[type]) -> Any:
    """Frames (bytes-like) back into one of the `expected` attrs classes; WireError says what is wrong with them."""
    size = sum(memoryview(f).nbytes for f in frames)
    if size > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {size} bytes, more than the {MAX_MESSAGE_BYTES} a wire accepts")
    names = {c.__name__: c for c in expected}
    try:
        name, fields = msgpack.unpackb(frames[0])
        cls = names[name]
        return _converter.structure(_raise_arrays(fields, frames), cls)
    except Exception as error:  # a hostile frame can fail anywhere in here, and must harm nobody else
        reason = "; ".join(cattrs.transform_error(error)) if isinstance(error, cattrs.BaseValidationError) else repr(error)
        raise WireError(f"malformed message, expected one of {', '.join(sorted(names))}: {reason}") from None


def _raise_arrays(value: Any, frames: Sequence[Any]) -> Any:
    if isinstance(value, dict):
        if "@" in value:
            return _array(value, frames)
        return {k: _raise_arrays(v, frames) for k, v in value.items()}
    if isinstance(value, list):
        return [_raise_arrays(v, frames) for v in value]
    return value


def _array(spec: dict[str, Any], frames: Sequence[Any]) -> np.ndarray:
    index, dtype, shape = spec["@"], spec["dtype"], spec["shape"]
    if dtype not in _DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"column of dtype {dtype!r} and shape {shape!r}")
    if not 1 <= index < len(frames):
        raise ValueError(f"column in frame {index} of {len(frames)}")
    expected, seen = math.prod(shape) * np.dtype(dtype).itemsize, memoryview(frames[index]).nbytes
    if expected != seen:
        raise ValueError(f"column of {seen} bytes where shape {shape} of {dtype} has {expected}")
    return np.frombuffer(frames[index], dtype=dtype).reshape(shape)


def _structure_array(value: Any, hint: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"expected a column, got {type(value).__name__}")
    dtype = _array_dtype(hint)
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"expected a column of {dtype}, got {value.dtype}")
    return value


def _array_dtype(hint: Any) -> Any:
    """The element type of `NDArray[...]`, or None for Any."""
    try:
        return np.dtype(hint.__args__[1].__args__[0])
    except (AttributeError, IndexError, TypeError):
        return None


def _exactly(kind: type) -> Any:
    def structure(value: Any, _: type) -> Any:
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__} {value!r}")

    return structure


_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind in (bool, int, float, str):
    _converter.register_structure_hook(_kind, _exactly(_kind))
_converter.register_structure_hook_func(lambda hint: get_origin(hint) is np.ndarray, _structure_array)


# --- connections ------------------------------------------------------------------------------------------------------
def _dealer(context: Any, run_dir: RunDir, identity: str, timeout: float) -> Any:
    """A DEALER socket connected to the run's controller, waiting up to `timeout` seconds for it to listen."""
    deadline = time.monotonic() + timeout
    while not run_dir.controller.is_file():
        if time.monotonic() > deadline:
            raise InfrastructureError(f"the controller did not listen within {timeout:.0f} s ({run_dir.controller} is missing)")
        time.sleep(0.05)
    address = json.loads(run_dir.controller.read_text())["address"]
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    socket.setsockopt(zmq.PLAIN_USERNAME, _USER)
    socket.setsockopt(zmq.PLAIN_PASSWORD, run_dir.token().encode())
    socket.setsockopt(zmq.LINGER, 5000)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    return socket


class Connection:
    """A worker's blocking connection to the controller (trainer ranks)."""

    def __init__(self, run_dir: RunDir, identity: str, *, timeout: float = 120.0) -> None:
        self._context = zmq.Context()
        self._socket = _dealer(self._context, run_dir, identity, timeout)

    def send(self, message: Any) -> None:
        self._socket.send_multipart(encode(message), copy=False)

    def receive(self, expected: Sequence[type]) -> Any:
        frames = self._socket.recv_multipart(copy=False)
        return decode([f.buffer for f in frames], expected)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class AsyncConnection:
    """A worker's connection to the controller inside an event loop (environment workers, engines)."""

    def __init__(self, run_dir: RunDir, identity: str, *, timeout: float = 120.0) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = _dealer(self._context, run_dir, identity, timeout)

    async def send(self, message: Any) -> None:
        await self._socket.send_multipart(encode(message), copy=False)

    async def receive(self, expected: Sequence[type]) -> Any:
        frames = await self._socket.recv_multipart(copy=False)
        return decode([f.buffer for f in frames], expected)

    def close(self) -> None:
        self._socket.close()
        self._context.term()
