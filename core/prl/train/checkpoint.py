"""The trainer's part of a checkpoint: what each rank holds, written by that rank.

    <checkpoint>/trainer/rank-<r>.safetensors    its shards of parameters, buffers and optimizer state
    <checkpoint>/trainer/rank-<r>.json           step, version, ranks, one record with a checksum per tensor

No pickle, no gather: a rank writes and reads only its own shards, so a checkpoint belongs to its number of ranks. A
snapshot is a copy in host memory, so the next step may change the originals while the copy is written. Loading restores
every byte, hence a resumed run continues bit for bit. Called by `prl.train.worker` and, for writing, `prl.train.saver`;
the controller names the folder and commits it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import cattrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prl import checkpoint_dir
from prl.checkpoint_dir import FileRecord, RecordedFile, write_json
from prl.errors import CheckpointError
from prl.blocks.sharded import local
from prl.types import TensorRecord
from prl.weights.tensors import read_tensors, write_safetensors


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
    numbers: Mapping[str, Any]
    """Optimizer state that is no tensor."""


@attrs.frozen(kw_only=True, eq=False)
class Snapshot:
    """The state of a rank at one moment, in host memory."""

    rank: int
    tensors: Mapping[str, Tensor]
    record: RankRecord
    """What is known before the tensors are written: all but `tensors`."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's part: name -> what this rank holds of it."""
        kinds = {name: name.partition("/") for name in self.tensors}
        return {rest: self.tensors[name] for name, (kind, _, rest) in kinds.items() if kind == "model"}

    def write(self, checkpoint: Path) -> dict[str, FileRecord]:
        """Write this rank's files into `checkpoint`, a folder that nobody reads yet; by their paths in it."""
        (checkpoint / "trainer").mkdir(parents=True, exist_ok=True)
        shards, record = file_names(self.rank)
        with RecordedFile(checkpoint / shards) as file:
            tensors = write_safetensors(file, self.tensors.items())
        content = cattrs.unstructure(attrs.evolve(self.record, tensors=tensors))
        return {shards: file.record, record: write_json(checkpoint / record, content)}


def file_names(rank: int) -> tuple[str, str]:
    """Paths in a checkpoint of a rank's shards and of its record."""
    return f"trainer/rank-{rank}.safetensors", f"trainer/rank-{rank}.json"


@attrs.frozen(kw_only=True, eq=False)
class TrainerState:
    """The model and the optimizer of a rank, as a checkpoint sees them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rank: int
    world_size: int
    seed: int

    def snapshot(self, *, step: int, version: int) -> Snapshot:
        """A copy of everything, as it is now."""
        state = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= dict(self._optimizer_items())
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        record = RankRecord(
            step=step,
            version=version,
            seed=self.seed,
            world_size=self.world_size,
            optimizer=type(self.optimizer).__name__,
            tensors=(),
            shapes={name: tuple(t.shape) for name, t in tensors.items()},
            numbers={name: value for name, value in state.items() if name not in tensors},
        )
        copies = {name: local(tensor.detach()).to("cpu", copy=True) for name, tensor in tensors.items()}
        return Snapshot(rank=self.rank, tensors=copies, record=record)

    def load(self, checkpoint: Path) -> int:
        """Restore a snapshot that was written; returns the policy version. CheckpointError when it is not this
        trainer's, or not what was written."""
        shards, _ = names = file_names(self.rank)
        manifest = checkpoint_dir.read_manifest(checkpoint)
        if manifest.files.keys().isdisjoint(names):
            raise CheckpointError(f"checkpoint {checkpoint} has no part for rank {self.rank}: it is of fewer ranks")
        checkpoint_dir.verify(checkpoint, manifest, names)
        record = self._read_record(checkpoint)
        tensors = dict(read_tensors(checkpoint / shards, record.tensors, what=f"checkpoint {checkpoint}"))
        self._load_model(tensors, record, checkpoint)
        self._load_optimizer(tensors, record)
        return record.version

    def _optimizer_items(self) -> Iterator[tuple[str, Any]]:
        """(`optimizer/<parameter>/<key>`, value) of everything the optimizer remembers about a parameter."""
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"optimizer/{name}/{key}", value

    def _read_record(self, checkpoint: Path) -> RankRecord:
        _, name = file_names(self.rank)
        record = cattrs.structure(json.loads((checkpoint / name).read_text()), RankRecord)
        self._check_origin(record, checkpoint)
        return record

    def _check_origin(self, record: RankRecord, checkpoint: Path) -> None:
        """Number of ranks and kind of optimizer must be this run's."""
        for field, seen, expected in (
            ("trainer.ranks", record.world_size, self.world_size),
            ("optimizer", record.optimizer, type(self.optimizer).__name__),
        ):
            if seen != expected:
                raise CheckpointError(f"checkpoint {checkpoint} was written with {field} {seen}, here it is {expected}")

    def _load_model(self, tensors: Mapping[str, Tensor], record: RankRecord, checkpoint: Path) -> None:
        state = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        held = {name: tuple(tensor.shape) for name, tensor in state.items()}
        saved = {name: shape for name, shape in record.shapes.items() if name.startswith("model/")}
        for name in sorted(held.keys() | saved.keys()):
            if held.get(name) != saved.get(name):
                there, here = saved.get(name, "not present"), held.get(name, "not present")
                raise CheckpointError(f"checkpoint {checkpoint} is of another model: {name} is {there}, here {here}")
        with torch.no_grad():
            for name, tensor in state.items():
                local(tensor).copy_(tensors[name])

    def _load_optimizer(self, tensors: Mapping[str, Tensor], record: RankRecord) -> None:
        """Through the optimizer's own `load_state_dict`, which knows where each of its values must lie."""
        parameters = dict(self.model.named_parameters())
        states: dict[str, dict[str, Any]] = defaultdict(dict)
        for path, value in {**tensors, **record.numbers}.items():
            kind, _, rest = path.partition("/")
            name, _, key = rest.rpartition("/")
            if kind == "optimizer":
                states[name][key] = _as_shard(parameters[name], value, record.shapes.get(path))
        names = {id(parameter): name for name, parameter in parameters.items()}
        order = [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {index: states[name] for index, name in enumerate(order) if name in states}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _as_shard(parameter: nn.Parameter, value: Any, shape: tuple[int, ...] | None) -> Any:
    """State of a parameter's shape is sharded as the parameter is; anything else is whole on every rank."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(parameter, DTensor) or shape != tuple(parameter.shape):
        return value.clone()
    return DTensor.from_local(
        value.clone(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
