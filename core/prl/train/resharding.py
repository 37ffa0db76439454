"""The parts of a checkpoint, and who reads which of them.

Every rank that wrote has a record of where in the whole its parts lie. From these, torch's distributed checkpoint
(`torch.distributed.checkpoint`) plans for each tensor of the reading rank which pieces of which parts make it up; the
bytes are read here, verified. A rank opens only the files it needs something of, and asks no other rank anything.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import cattrs
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from prl import checkpoint_dir
from prl.checkpoint_dir import CheckpointManifest
from prl.types import TensorRecord
from prl.weights.tensors import read_tensors


@attrs.frozen(kw_only=True)
class RankRecord:
    """`rank-<r>.json`."""

    step: int
    version: int
    seed: int
    world_size: int
    optimizer: str
    """Class of the optimizer."""
    tensors: tuple[TensorRecord, ...]
    shapes: Mapping[str, tuple[int, ...]]
    """Tensor -> its shape over all ranks."""
    offsets: Mapping[str, tuple[int, ...]]
    """Tensor -> where in the whole this rank's part begins."""
    numbers: Mapping[str, Any]
    """Optimizer state that is no tensor."""


def file_names(rank: int) -> tuple[str, str]:
    """Paths in a checkpoint of a rank's shards and of its record."""
    return f"trainer/rank-{rank}.safetensors", f"trainer/rank-{rank}.json"


@attrs.frozen(kw_only=True, eq=False)
class StoredParts:
    """Everything the ranks have written into a checkpoint."""

    checkpoint: Path
    manifest: CheckpointManifest
    records: Sequence[RankRecord]
    """By rank."""

    @classmethod
    def open(cls, checkpoint: Path) -> StoredParts:
        """Read every rank's record; CheckpointError for one that is missing or damaged, and for a missing file."""
        manifest = checkpoint_dir.read_manifest(checkpoint)
        first = cls._read(checkpoint, manifest, 0)
        others = (cls._read(checkpoint, manifest, rank) for rank in range(1, first.world_size))
        return cls(checkpoint=checkpoint, manifest=manifest, records=(first, *others))

    @staticmethod
    def _read(checkpoint: Path, manifest: CheckpointManifest, rank: int) -> RankRecord:
        shards, record = file_names(rank)
        checkpoint_dir.verify(checkpoint, manifest, [record])
        checkpoint_dir.check_size(checkpoint, manifest, shards)
        return cattrs.structure(json.loads((checkpoint / record).read_text()), RankRecord)

    @property
    def record(self) -> RankRecord:
        """What all ranks agree on."""
        return self.records[0]

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor that was written."""
        found = next(tensor.dtype for record in self.records for tensor in record.tensors if tensor.name == name)
        dtype = getattr(torch, found)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def load(self, targets: Mapping[str, Tensor]) -> None:
        """Fill this rank's parts of the targets; CheckpointError for a file that is damaged."""
        places: dict[tuple[str, tuple[int, ...]], tuple[int, TensorRecord]] = {}
        for rank, record in enumerate(self.records):
            places |= {(tensor.name, tuple(record.offsets[tensor.name])): (rank, tensor) for tensor in record.tensors}
        planner = DefaultLoadPlanner()
        planner.set_up_planner(dict(targets), self._metadata(), is_coordinator=True)
        wanted: dict[int, list[tuple[ReadItem, TensorRecord]]] = defaultdict(list)
        for item in planner.create_local_plan().items:
            assert item.storage_index.offset is not None, "every part was given one"
            rank, place = places[item.storage_index.fqn, tuple(item.storage_index.offset)]
            wanted[rank].append((item, place))
        for rank, items in sorted(wanted.items()):
            self._read_file(file_names(rank)[0], items, planner)

    def _metadata(self) -> Metadata:
        """Where parts lie in their wholes, as the planner wants to be told."""
        chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
        for record in self.records:
            for tensor in record.tensors:
                offsets = torch.Size(record.offsets[tensor.name])
                chunks[tensor.name].append(ChunkStorageMetadata(offsets, torch.Size(tensor.shape)))
        properties = {name: TensorProperties(dtype=self.dtype(name)) for name in chunks}
        shapes = {name: torch.Size(self.record.shapes[name]) for name in chunks}
        return Metadata(
            {name: TensorStorageMetadata(properties[name], shapes[name], parts) for name, parts in chunks.items()}
        )

    def _read_file(self, name: str, wanted: Sequence[tuple[ReadItem, TensorRecord]], planner: LoadPlanner) -> None:
        checkpoint_dir.verify(self.checkpoint, self.manifest, [name])
        records = {record.name: record for _, record in wanted}
        what = f"checkpoint {self.checkpoint}"
        tensors = dict(read_tensors(self.checkpoint / name, list(records.values()), what=what))
        for item, record in wanted:
            piece = tensors[record.name]
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                piece = piece.narrow(dim, start, length)
            planner.resolve_tensor(item).detach().copy_(piece)
