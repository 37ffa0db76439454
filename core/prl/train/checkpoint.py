"""The trainer's part of a checkpoint: what each rank holds, written by that rank.

    <checkpoint>/trainer/rank-<r>.safetensors    its shards of parameters, buffers and optimizer state
    <checkpoint>/trainer/rank-<r>.json           step, version, one record per tensor: checksum, place in the whole

No pickle, no gather: a rank writes its own parts, each part is written by one rank. Any mesh loads what any other has
written: torch's distributed checkpoint plans which parts of which files a rank needs (`prl.train.resharding`). A
snapshot is a copy in host memory, so the next step may change the originals while the copy is written. Loading restores
every byte, hence a resumed run continues bit for bit on the same mesh, and from the same bytes on another. Called by
`prl.train.worker` and, for writing, `prl.train.saver`; the controller names the folder and commits it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import cattrs
import torch
from torch import Tensor, nn

from prl.blocks.sharded import local, part_of
from prl.checkpoint_dir import FileRecord, RecordedFile, write_json
from prl.errors import CheckpointError
from prl.train import resharding
from prl.train.resharding import RankRecord, file_names
from prl.weights.tensors import write_safetensors


@attrs.frozen(kw_only=True, eq=False)
class Snapshot:
    """The state of a rank at one moment, in host memory."""

    rank: int
    tensors: Mapping[str, Tensor]
    record: RankRecord
    """What is known before the tensors are written: all but `tensors`."""

    def write(self, checkpoint: Path) -> dict[str, FileRecord]:
        """Write this rank's files into `checkpoint`, a folder that nobody reads yet; by their paths in it."""
        (checkpoint / "trainer").mkdir(parents=True, exist_ok=True)
        shards, record = file_names(self.rank)
        with RecordedFile(checkpoint / shards) as file:
            tensors = write_safetensors(file, self.tensors.items())
        content = cattrs.unstructure(attrs.evolve(self.record, tensors=tensors))
        return {shards: file.record, record: write_json(checkpoint / record, content)}


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
        tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
        parts = {name: part_of(tensor, rank=self.rank) for name, tensor in tensors.items()}
        written = {name: part for name, part in parts.items() if part.first and 0 not in part.sizes}
        record = RankRecord(
            step=step,
            version=version,
            seed=self.seed,
            world_size=self.world_size,
            optimizer=type(self.optimizer).__name__,
            tensors=(),
            shapes={name: part.shape for name, part in parts.items()},
            offsets={name: part.offsets for name, part in written.items()},
            numbers={name: value for name, value in state.items() if name not in tensors},
        )
        copies = {name: local(tensors[name]).to("cpu", copy=True) for name in written}
        return Snapshot(rank=self.rank, tensors=copies, record=record)

    def load(self, checkpoint: Path) -> int:
        """Restore what the ranks of any mesh have written; returns the policy version. CheckpointError when it is not
        this trainer's, or not what was written."""
        stored = resharding.StoredParts.open(checkpoint)
        self._check_origin(stored.record, checkpoint)
        model = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        self._check_model(model, stored.record, checkpoint)
        optimizer = self._optimizer_targets(stored)
        stored.load({**model, **optimizer})
        self._load_optimizer(optimizer, stored.record)
        return stored.record.version

    def _optimizer_items(self) -> Iterator[tuple[str, Any]]:
        """(`optimizer/<parameter>/<key>`, value) of everything the optimizer remembers about a parameter."""
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"optimizer/{name}/{key}", value

    def _check_origin(self, record: RankRecord, checkpoint: Path) -> None:
        """The kind of optimizer must be this run's."""
        seen, expected = record.optimizer, type(self.optimizer).__name__
        if seen != expected:
            raise CheckpointError(f"checkpoint {checkpoint} was written with optimizer {seen}, here it is {expected}")

    def _check_model(self, model: Mapping[str, Tensor], record: RankRecord, checkpoint: Path) -> None:
        held = {name: tuple(tensor.shape) for name, tensor in model.items()}
        saved = {name: shape for name, shape in record.shapes.items() if name.startswith("model/")}
        for name in sorted(held.keys() | saved.keys()):
            if held.get(name) != saved.get(name):
                there, here = saved.get(name, "not present"), held.get(name, "not present")
                raise CheckpointError(f"checkpoint {checkpoint} is of another model: {name} is {there}, here {here}")

    def _optimizer_targets(self, stored: resharding.StoredParts) -> dict[str, Tensor]:
        """Room for every stored tensor of the optimizer: divided as its parameter is where it has its shape, else
        whole on every rank."""
        parameters = dict(self.model.named_parameters())
        targets: dict[str, Tensor] = {}
        for path, shape in stored.record.shapes.items():
            kind, _, rest = path.partition("/")
            if kind == "optimizer":
                parameter = parameters[rest.rpartition("/")[0]].detach()
                dtype = stored.dtype(path)
                like = shape == tuple(parameter.shape)
                targets[path] = torch.empty_like(parameter, dtype=dtype) if like else torch.empty(shape, dtype=dtype)
        return targets

    def _load_optimizer(self, tensors: Mapping[str, Tensor], record: RankRecord) -> None:
        """Through the optimizer's own `load_state_dict`, which knows where each of its values must lie."""
        states: dict[str, dict[str, Any]] = defaultdict(dict)
        for path, value in {**tensors, **record.numbers}.items():
            name, _, key = path.removeprefix("optimizer/").rpartition("/")
            states[name][key] = value
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        order = [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {index: states[name] for index, name in enumerate(order) if name in states}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
