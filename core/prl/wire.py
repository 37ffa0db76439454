"""Messages on a wire: a msgpack header and the raw bytes of every column.

    frame 0      [class name, fields]; an attrs object is a map of its fields, an enum its value, a column an extension:
                 a short vector lies inside (code = its dtype, data = its bytes), any other names its frame
    frame 1..    the other columns' bytes, not copied on the way out

Nothing is pickled. `decode` accepts only the classes it is told to expect, structures them strictly and bounds their
size; anything else is a WireError with a reason. Connections are ZeroMQ sockets that authenticate with the run's token.
Workers use the two connection classes; the controller's end is `prl.dispatch.hub`.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeAlias, get_origin

import attrs
import cattrs
import cattrs.v
import msgpack  # type: ignore[import-untyped]
import numpy as np
import zmq
import zmq.asyncio
from numpy.typing import NDArray

from prl.errors import InfrastructureError
from prl.run_dir import RunDir

Frame: TypeAlias = bytes | memoryview

MAX_MESSAGE_BYTES = 8 << 30
MAX_FRAME_BYTES = 64 << 20
"""Of what workers send; a column of 16 million tokens. What is larger travels by reference (`prl.columns`)."""
USER = "prl"
"""User name of PLAIN authentication; the password is the run's token."""

_DTYPES = tuple(map(np.dtype, ("bool", "uint8", "uint16", "int32", "int64", "float32")))
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}  # extension code of a short vector
_IN_FRAME = 100  # extension code of a column in a frame of its own
_MOST_ENTRIES = 1 << 17  # of one list or map: a header of a few bytes may announce more than memory holds
_EXPLAINED_BYTES = 1 << 20  # of a header; naming everything that is wrong takes longer than reading it
_WORD = struct.Struct("<Q")  # of a message at rest
_INLINE_BYTES = 4096  # below this, one more frame costs more than one more copy


class WireError(InfrastructureError):
    """A message that is not what it should be."""


# --- encode -----------------------------------------------------------------------------------------------------------
def encode(message: Any) -> list[Frame]:
    """An attrs message as frames; long columns are sent from where they lie, so they must not change meanwhile."""
    buffers: list[Frame] = []

    def lower(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return _lower_column(value, buffers)
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, Mapping):
            return dict(value)
        return {name: getattr(value, name) for name in _field_names(value.__class__)}

    header = msgpack.packb([type(message).__name__, lower(message)], default=lower)
    return [header, *buffers]


@functools.cache
def _field_names(cls: type) -> tuple[str, ...]:
    if not attrs.has(cls):
        raise TypeError(f"a {cls.__name__} cannot travel on a wire")
    return tuple(field.name for field in attrs.fields(cls))


def _lower_column(array: NDArray[Any], buffers: list[Frame]) -> msgpack.ExtType:
    code = _CODES.get(array.dtype)
    if code is None:
        raise TypeError(f"a column of {array.dtype} cannot travel on a wire, only {', '.join(map(str, _DTYPES))}")
    if array.ndim == 1 and array.nbytes <= _INLINE_BYTES:
        return msgpack.ExtType(code, array.tobytes())
    buffers.append(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return msgpack.ExtType(_IN_FRAME, msgpack.packb([len(buffers), code, list(array.shape)]))


# --- decode -----------------------------------------------------------------------------------------------------------
def decode(frames: Sequence[Any], expected: Sequence[type]) -> Any:
    """Frames (bytes-like) back into one of the `expected` attrs classes; WireError says what is wrong with them."""
    if (total := size(frames)) > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {total} bytes, more than the {MAX_MESSAGE_BYTES} a wire accepts")
    classes = {cls.__name__: cls for cls in expected}
    try:
        name, fields = _unpack(frames[0], functools.partial(_raise_column, frames))
        return _structure(fields, classes[name], explain=memoryview(frames[0]).nbytes <= _EXPLAINED_BYTES)
    except Exception as error:  # a hostile frame can fail anywhere in here, and must harm nobody else
        known = ", ".join(sorted(classes))
        raise WireError(f"malformed message, expected one of {known}: {_reason(error):.2000}") from None


def _unpack(content: Any, raise_column: Callable[[int, bytes], Any]) -> Any:
    return msgpack.unpackb(content, ext_hook=raise_column, max_array_len=_MOST_ENTRIES, max_map_len=_MOST_ENTRIES)


def size(frames: Sequence[Any]) -> int:
    """Bytes of a message."""
    return sum(memoryview(frame).nbytes for frame in frames)


def _reason(error: Exception) -> str:
    if not isinstance(error, cattrs.BaseValidationError):
        return repr(error)
    return "; ".join(cattrs.transform_error(error, format_exception=_explain))


def _explain(error: BaseException, expected: type | None) -> str:
    return str(error) if isinstance(error, TypeError) else cattrs.v.format_exception(error, expected)


def _structure(fields: Any, cls: type, *, explain: bool) -> Any:
    try:
        return _converter.structure(fields, cls)
    except Exception:
        if not explain:
            raise
        return _explaining_converter.structure(fields, cls)  # slower, and names every field that is wrong


def _raise_column(frames: Sequence[Any], code: int, content: bytes) -> NDArray[Any]:
    if code == _IN_FRAME:
        return _column_in_frame(frames, *_unpack(content, _refuse_column))
    return np.frombuffer(content, dtype=_dtype(code))


def _refuse_column(code: int, content: bytes) -> Any:
    raise ValueError(f"extension {code} inside a column")


def _dtype(code: int) -> np.dtype[Any]:
    if not 0 <= code < len(_DTYPES):
        raise ValueError(f"column of type {code}")
    return _DTYPES[code]


def _column_in_frame(frames: Sequence[Any], index: int, code: int, shape: list[int]) -> NDArray[Any]:
    if not 1 <= index < len(frames):
        raise ValueError(f"column in frame {index} of {len(frames)}")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"column of shape {shape!r}")
    dtype = _dtype(code)
    expected, seen = math.prod(shape) * dtype.itemsize, memoryview(frames[index]).nbytes
    if expected != seen:
        raise ValueError(f"column of {seen} bytes where shape {shape} of {dtype} has {expected}")
    return np.frombuffer(frames[index], dtype=dtype).reshape(shape)


# --- messages at rest -------------------------------------------------------------------------------------------------
def join(frames: Sequence[Any]) -> list[Frame]:
    """A message's frames as they lie in a file: how many, the length of each (8 bytes, little-endian), the frames."""
    views = [memoryview(frame) for frame in frames]
    return [b"".join(map(_WORD.pack, (len(views), *(view.nbytes for view in views)))), *views]


def split(content: memoryview) -> Iterator[list[memoryview]]:
    """The frames of each message of a file, as views; ValueError when it ends inside of one."""
    start = 0
    while start < len(content):
        if start + _WORD.size > len(content):
            raise ValueError(f"it ends at byte {len(content)}, inside the number of a record's frames")
        (count,) = _WORD.unpack_from(content, start)
        first = start + _WORD.size
        start = first + _WORD.size * count
        if start > len(content):
            raise ValueError(f"it ends at byte {len(content)}, inside a record of {count} frames")
        lengths = [length for (length,) in _WORD.iter_unpack(content[first:start])]
        frames = []
        for length in lengths:
            frames.append(content[start : start + length])
            start += length
        yield frames


# --- strict structuring -----------------------------------------------------------------------------------------------
Structure: TypeAlias = Callable[[Any, Any], Any]


def _exactly(kind: type) -> Structure:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__} {value!r:.100}")

    return structure


def _column_structure(hint: Any) -> Structure:
    """Checks a column against `NDArray[element]`, where the element may be Any."""
    element = hint.__args__[1].__args__[0]
    dtype = None if element is Any else np.dtype(element)

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"expected a column, got {type(value).__name__}")
        if dtype is not None and value.dtype != dtype:
            raise TypeError(f"expected a column of {dtype}, got {value.dtype}")
        return value

    return structure


def _make_converter(*, explain: bool) -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=explain)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_structure_hook_factory(_is_column, _column_structure)
    return converter


def _is_column(hint: Any) -> bool:
    origin: Any = get_origin(hint)
    return origin is np.ndarray


_converter = _make_converter(explain=False)
_explaining_converter = _make_converter(explain=True)


# --- connections ------------------------------------------------------------------------------------------------------
def _dealer(context: Any, run_dir: RunDir, identity: str, timeout: float) -> Any:
    """A DEALER socket connected to the run's controller, waiting up to `timeout` seconds for it to listen."""
    deadline = time.monotonic() + timeout
    while not run_dir.controller.is_file():
        if time.monotonic() > deadline:
            raise InfrastructureError(
                f"the controller did not listen within {timeout:.0f} s ({run_dir.controller} is missing); see its log"
            )
        time.sleep(0.05)
    address = json.loads(run_dir.controller.read_text())["address"]
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    socket.setsockopt(zmq.PLAIN_USERNAME, USER.encode())
    socket.setsockopt(zmq.PLAIN_PASSWORD, run_dir.token().encode())
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    return socket


class Connection:
    """A worker's blocking connection to the controller (trainer ranks).

    Raises InfrastructureError when the controller does not listen within `timeout` seconds.
    """

    def __init__(self, run_dir: RunDir, identity: str, *, timeout: float = 120.0) -> None:
        self._context = zmq.Context()
        self._socket = _dealer(self._context, run_dir, identity, timeout)

    def send(self, message: Any) -> None:
        self._socket.send_multipart(encode(message), copy=False)

    def receive(self, expected: Sequence[type]) -> Any:
        """The next message, one of the `expected` classes; WireError when it is something else."""
        frames = self._socket.recv_multipart(copy=False)
        return decode([frame.buffer for frame in frames], expected)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class AsyncConnection:
    """A worker's connection to the controller inside an event loop (environment workers, engines).

    Made before the loop has anything to do: construction blocks until the controller listens.
    """

    def __init__(self, run_dir: RunDir, identity: str, *, timeout: float = 120.0) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = _dealer(self._context, run_dir, identity, timeout)

    async def send(self, message: Any) -> None:
        await self._socket.send_multipart(encode(message), copy=False)

    async def receive(self, expected: Sequence[type]) -> Any:
        """The next message, one of the `expected` classes; WireError when it is something else."""
        frames = await self._socket.recv_multipart(copy=False)
        return decode([frame.buffer for frame in frames], expected)

    def close(self) -> None:
        self._socket.close()
        self._context.term()
