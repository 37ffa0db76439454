"""Completions as binary columns in one HTTP body: what prl's own client asks for instead of JSON.

    u32 number of frames | u64 size of each | the frames of `prl.wire`, one after the other     (little endian)

Shared by the server and the client; imports no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import attrs

from prl import wire
from prl.types import Completion

T = TypeVar("T")

MEDIA_TYPE = "application/x-prl-columns"
"""A generate request with this in its `Accept` header is answered in columns."""
_MAX_FRAMES = 1 << 16


@attrs.frozen(kw_only=True)
class Completions:
    """The answer to a generate request."""

    request_id: str
    completions: tuple[Completion, ...]
    prompt_tokens: int
    reused_tokens: int


def pack(message: Any) -> bytes:
    """A message of `prl.wire` as one body."""
    frames = wire.encode(message)
    sizes = [memoryview(frame).nbytes for frame in frames]
    return b"".join([struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes), *frames])


def unpack(body: bytes, kind: type[T]) -> T:
    """The inverse of `pack`; WireError when the body is something else."""
    message: T = wire.decode(_frames(body), (kind,))
    return message


def _frames(body: bytes) -> Sequence[memoryview]:
    try:
        (count,) = struct.unpack_from("<I", body)
        if count > _MAX_FRAMES:
            raise wire.WireError(f"{count} frames in one answer")
        sizes = struct.unpack_from(f"<{count}Q", body, 4)
    except struct.error as error:
        raise wire.WireError(f"an answer of {len(body)} bytes is cut short: {error}") from None
    start, frames, view = 4 + 8 * count, [], memoryview(body)
    for size in sizes:
        frames.append(view[start : start + size])
        start += size
    if start != len(body):
        raise wire.WireError(f"an answer of {len(body)} bytes where its frames have {start}")
    return frames
