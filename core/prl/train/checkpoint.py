"""The trainer's part of a checkpoint: what each rank holds, written by that rank.

    <checkpoint>/trainer/rank-<r>.safetensors    its shards of parameters, buffers and optimizer state
    <checkpoint>/trainer/rank-<r>.json           step, version, ranks, one record with a checksum per tensor

No pickle, no gather: a rank writes and reads only its own shards, so a checkpoint belongs to its number of ranks. The
records are written last: shards without them are a checkpoint that was cut short. Loading restores every byte, hence a
resumed run continues bit for bit. Called by `prl.train.worker`; the controller names the folder and commits it.
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

from prl.errors import CheckpointError, InfrastructureError
from prl.train.parallel import local
from prl.types import TensorRecord
from prl.weights.tensors import read_tensors, write_atomically, write_safetensors

FORMAT = 1


@attrs.frozen(kw_only=True)
class RankRecord:
    """`rank-<r>.json`."""

    format: int
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
class TrainerState:
    """The model and the optimizer of a rank, as a checkpoint sees them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rank: int
    world_size: int
    seed: int

    def save(self, checkpoint: Path, *, step: int, version: int) -> None:
        """Write this rank's shards into `checkpoint`, a folder that nobody reads yet."""
        folder = checkpoint / "trainer"
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= dict(self._optimizer_items())
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        shards = ((name, local(tensor)) for name, tensor in tensors.items())
        record = RankRecord(
            format=FORMAT,
            step=step,
            version=version,
            seed=self.seed,
            world_size=self.world_size,
            optimizer=type(self.optimizer).__name__,
            tensors=write_atomically(self._shards(folder), write_safetensors, shards),
            shapes={name: tuple(t.shape) for name, t in tensors.items()},
            numbers={name: value for name, value in state.items() if name not in tensors},
        )
        self._record(folder).write_text(json.dumps(cattrs.unstructure(record), indent=1))

    def load(self, checkpoint: Path) -> int:
        """Restore what `save` wrote; returns the policy version. CheckpointError when it is not this trainer's."""
        folder = checkpoint / "trainer"
        record = self._read_record(folder)
        try:
            tensors = dict(read_tensors(self._shards(folder), record.tensors, what=f"checkpoint {checkpoint}"))
        except InfrastructureError as error:
            raise CheckpointError(str(error)) from None
        self._load_model(tensors, record, checkpoint)
        self._load_optimizer(tensors, record)
        return record.version

    def _optimizer_items(self) -> Iterator[tuple[str, Any]]:
        """(`optimizer/<parameter>/<key>`, value) of everything the optimizer remembers about a parameter."""
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"optimizer/{name}/{key}", value

    def _shards(self, folder: Path) -> Path:
        return folder / f"rank-{self.rank}.safetensors"

    def _record(self, folder: Path) -> Path:
        return folder / f"rank-{self.rank}.json"

    def _read_record(self, folder: Path) -> RankRecord:
        path = self._record(folder)
        try:
            record = cattrs.structure(json.loads(path.read_text()), RankRecord)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: no checkpoint, one cut short, or one of fewer ranks") from None
        except (ValueError, cattrs.BaseValidationError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        self._check_origin(record, folder.parent)
        return record

    def _check_origin(self, record: RankRecord, checkpoint: Path) -> None:
        """Format, number of ranks and kind of optimizer must be this run's."""
        for field, seen, expected in (
            ("format", record.format, FORMAT),
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
