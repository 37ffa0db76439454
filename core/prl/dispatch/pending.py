"""Finished groups in a file: those of a checkpoint that no step was trained on yet.

One record per group, as the wire encodes it. Columns stay raw; nothing is pickled. Called by
`prl.dispatch.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prl import wire
from prl.checkpoint_dir import FileRecord, RecordedFile
from prl.errors import CheckpointError
from prl.types import Group


def write(path: Path, groups: Iterable[Group]) -> FileRecord:
    """Write the groups into a new file, one after the other."""
    with RecordedFile(path) as file:
        for group in groups:
            for frame in wire.join(wire.encode(group)):
                file.write(frame)
    return file.record


def read(path: Path) -> list[Group]:
    """The groups of a file; their columns are views of its content. CheckpointError when it is not such a file."""
    content = memoryview(path.read_bytes())
    try:
        return [wire.decode(frames, (Group,)) for frames in wire.split(content)]
    except (ValueError, wire.WireError) as error:
        raise CheckpointError(f"{path} is no file of groups: {error}") from None
