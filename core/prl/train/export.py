"""A rank's parts become whole tensors under their published names, and every rank sends its share of them.

    stacks of experts     a rank has whole experts of its own: nothing moves between ranks
    everything else       made whole on all ranks, one tensor at a time; one of them keeps it, each about as many bytes

Every rank walks the model in the same order, because making a tensor whole is a collective. What a rank keeps goes to
its weight transport, or into files of a Hugging Face checkpoint. Called by `prl.train.worker`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from prl.blocks import checkpoint as huggingface
from prl.blocks.form import Form
from prl.blocks.sharded import full, is_divided, local, part_of
from prl.blocks.weight_map import stacked_views
from prl.providers import NumberFormat, WeightMap, WeightSender
from prl.train.parallel.context import all_gather
from prl.types import Manifest


@attrs.frozen(kw_only=True, eq=False)
class Shares:
    """Which of a model's tensors, under their checkpoint names, this rank is the one to send."""

    model: nn.Module
    weight_map: WeightMap
    rank: int = 0
    ranks: int = 1

    def own(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor as it is now) of this rank's share. A collective throughout."""
        loads = [0] * self.ranks
        for name, tensor in self.model.state_dict().items():
            views = stacked_views(self.weight_map, name, tensor.shape) if is_divided(tensor) else None
            if views is not None and is_divided(tensor):
                stack = _whole_matrices(tensor)
                part = part_of(stack, rank=self.rank)
                held, first = local(stack), part.offsets[0]
                for view in views if part.first else ():
                    if first <= view.index < first + len(held):
                        yield view.name, held[view.index - first].narrow(0, view.start, view.rows)
                continue
            whole = full(tensor)
            owner = loads.index(min(loads))
            loads[owner] += whole.nbytes
            if owner == self.rank:
                yield from self.weight_map.to_hf(name, whole)

    def owners(self) -> Mapping[str, int]:
        """Checkpoint name of every tensor -> the rank whose share it is in. A collective."""
        with torch.device("meta"):
            names = [
                hf_name
                for name, tensor in self.model.state_dict().items()
                for hf_name, _ in self.weight_map.to_hf(name, torch.empty(tensor.shape, dtype=tensor.dtype))
            ]
        mine = {hf_name for hf_name, _ in self.own()}
        device = next(self.model.parameters()).device
        mask = torch.tensor([name in mine for name in names], dtype=torch.uint8, device=device)
        masks = mask.new_empty(self.ranks * len(names))
        all_gather(masks, mask)
        return dict(zip(names, masks.view(self.ranks, -1).argmax(0).tolist(), strict=True))


def _whole_matrices(stack: DTensor) -> DTensor:
    """The stack divided by matrix alone; rows that are divided over further ranks are brought together."""
    placements = [
        Replicate() if isinstance(placement, Shard) and placement.dim else placement for placement in stack.placements
    ]
    return stack if placements == list(stack.placements) else stack.redistribute(placements=placements)


@attrs.frozen(kw_only=True, eq=False)
class Exporter:
    """Sends the weights of a model as they are at the time of the call."""

    shares: Shares
    number_format: NumberFormat
    sender: WeightSender
    float32: tuple[str, ...] = ()
    """Endings of the names of tensors that travel as they are."""
    unquantized: tuple[str, ...] = ()
    """Regular expressions for the names of matrices that are only cast."""

    def publish(self, version: int) -> Manifest:
        """Send this rank's share of `version`; all ranks take part."""
        return self.sender.send(version, self._tensors())

    def retire(self, version: int) -> None:
        self.sender.retire(version)

    def close(self) -> None:
        self.sender.close()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        form = Form(number_format=self.number_format, float32=self.float32, unquantized=self.unquantized)
        for hf_name, tensor in self.shares.own():
            yield from form.apply(hf_name, tensor)


@attrs.frozen(kw_only=True, eq=False)
class HuggingFaceExport:
    """Writes the policy, in the trainer's precision, as a folder that transformers, vLLM and another run can load.

    Every rank writes files of its own; the first also the index, config.json and what no rank has in its model.
    """

    shares: Shares
    tokenizer: Path | None = None
    """The tokenizer.json that goes with it."""
    origin: Path | None = None
    """The checkpoint the run started from, for the tensors that the weight map carries."""
    origin_format: NumberFormat | None = None
    """What decodes it."""

    owners: Mapping[str, int] = attrs.field(factory=dict)
    """`Shares.owners()`, where there are several ranks."""

    def collect(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """This rank's share of the weights as they are now, in host memory; all ranks take part.

        What an earlier attempt left in the checkpoint's folder is gone when any rank is done.
        """
        if self.shares.rank == 0:
            shutil.rmtree(checkpoint / "huggingface", ignore_errors=True)
        share = {hf_name: tensor.detach().to("cpu", copy=True) for hf_name, tensor in self.shares.own()}
        if self.shares.ranks > 1:
            dist.barrier()
        return share

    def write(self, share: Mapping[str, Tensor], checkpoint: Path) -> None:
        """Write what was collected into the folder `huggingface` of a checkpoint, while training goes on."""
        folder, shares = checkpoint / "huggingface", self.shares
        huggingface.save_share(
            share,
            shares.weight_map,
            folder,
            rank=shares.rank,
            owners=self.owners,
            origin=self.origin,
            origin_format=self.origin_format,
        )
        if self.tokenizer is not None and shares.rank == 0:
            shutil.copyfile(self.tokenizer, folder / "tokenizer.json")
