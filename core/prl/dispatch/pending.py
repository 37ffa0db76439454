"""Finished groups in a file: those of a checkpoint that no step was trained on yet.

One record per group, as the wire encodes it: the number of frames, the length of each (8 bytes, little-endian), the
frames. Columns stay raw; nothing is pickled. Called by `prl.dispatch.checkpoint`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from prl import wire
from prl.checkpoint_dir import FileRecord, RecordedFile
from prl.errors import CheckpointError
from prl.types import Group

_WORD = struct.Struct("<Q")


def write(path: Path, groups: Iterable[Group]) -> FileRecord:
    """Write the groups into a new file, one after the other."""
    with RecordedFile(path) as file:
        for group in groups:
            frames = [memoryview(frame) for frame in wire.encode(group)]
            file.write(b"".join(map(_WORD.pack, (len(frames), *(frame.nbytes for frame in frames)))))
            for frame in frames:
                file.write(frame)
    return file.record


def read(path: Path) -> list[Group]:
    """The groups of a file; their columns are views of its content. CheckpointError when it is not such a file."""
    content = memoryview(path.read_bytes())
    try:
        return [wire.decode(frames, (Group,)) for frames in _records(content)]
    except (struct.error, ValueError, wire.WireError) as error:
        raise CheckpointError(f"{path} is no file of groups: {error}") from None


def _records(content: memoryview) -> Iterator[list[memoryview]]:
    start = 0
    while start < len(content):
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
