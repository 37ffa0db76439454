"""Device memory that processes of one host share: CUDA's interprocess handles, through the runtime of torch.

https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__DEVICE.html (cudaIpcGetMemHandle and what follows).
torch shares tensors between processes by the same handles, and counts who uses them: a process that is killed before it
has given one up leaves the memory taken. Here nobody counts, see `device.py`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import attrs
import torch
from prl.errors import InfrastructureError
from torch import Tensor

HANDLE = 64
"""Bytes."""
_LAZY_PEER_ACCESS = 1
_DEFAULT = 4  # which way to copy is seen from the addresses


class _Handle(ctypes.Structure):
    _fields_ = (("content", ctypes.c_ubyte * HANDLE),)


@attrs.frozen(eq=False)
class Segment:
    """Memory of this process that others may open."""

    handle: bytes
    content: Tensor  # [nbytes] uint8


@attrs.frozen(eq=False)
class _Block:
    """What torch makes a tensor of without a copy."""

    address: int
    nbytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


class Cuda:
    """Calls of the runtime, on this thread's device."""

    def allocate(self, nbytes: int) -> Segment:
        """New memory, never given back: what another process has open must not be."""
        address, handle = ctypes.c_void_p(), _Handle()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        block = _Block(address.value or 0, nbytes)
        return Segment(bytes(handle), torch.as_tensor(block, device=torch.device("cuda", torch.cuda.current_device())))

    def open(self, handle: bytes) -> int:
        """Where this process sees memory of another one; until `close`."""
        address = ctypes.c_void_p()
        shared = _Handle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), shared, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return address.value or 0

    def close(self, address: int) -> None:
        self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(address))

    def copy(self, address: int, nbytes: int) -> Tensor:
        """[nbytes] uint8 on this device, once the current stream has come to it."""
        room = torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        there, here = ctypes.c_void_p(address), ctypes.c_void_p(room.data_ptr())
        self._call("cudaMemcpyAsync", here, there, ctypes.c_size_t(nbytes), ctypes.c_int(_DEFAULT), stream)
        return room

    def stream(self) -> Any:
        """Another stream than the one that computes, as a context."""
        return torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]

    def _call(self, name: str, *arguments: Any) -> None:
        runtime = _runtime()
        runtime.cudaSetDevice(ctypes.c_int(torch.cuda.current_device()))
        code = getattr(runtime, name)(*arguments)
        if code:
            runtime.cudaGetLastError()  # it is told here, and not by torch at the next call
            text = runtime.cudaGetErrorString(ctypes.c_int(code)) or b""
            raise InfrastructureError(f"{name}: {text.decode(errors='replace')} ({code})")


def problem() -> str:
    """What this process lacks; empty where it lacks nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible to this process"
    try:
        _runtime()
    except OSError as error:
        return f"CUDA's runtime library cannot be loaded: {error}"
    return ""


@cache
def _runtime() -> ctypes.CDLL:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    library = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).split('.')[0]}")
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library
