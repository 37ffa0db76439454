"""A rank's shards become whole tensors under their published names, one at a time.

Every rank walks the model in the same order, because making a sharded tensor whole is a collective; rank 0 hands what
it sees to the weight transport, or writes it as a Hugging Face checkpoint. Called by `prl.train.worker`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prl.blocks import checkpoint as huggingface
from prl.blocks.form import Form
from prl.providers import NumberFormat, WeightMap, WeightSender
from prl.blocks.sharded import full
from prl.types import Manifest


@attrs.frozen(kw_only=True, eq=False)
class Exporter:
    """Sends the weights of a model as they are at the time of the call."""

    model: nn.Module
    weight_map: WeightMap
    number_format: NumberFormat
    sender: WeightSender | None
    """None on every rank but the one that publishes."""
    float32: tuple[str, ...] = ()
    """Endings of the names of tensors that travel as they are."""
    unquantized: tuple[str, ...] = ()
    """Regular expressions for the names of matrices that are only cast."""

    def publish(self, version: int) -> Manifest | None:
        """Take part in sending `version`; the manifest on the rank that publishes."""
        if self.sender is not None:
            return self.sender.send(version, self._tensors())
        _take_part(self.model)
        return None

    def retire(self, version: int) -> None:
        if self.sender is not None:
            self.sender.retire(version)

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        form = Form(number_format=self.number_format, float32=self.float32, unquantized=self.unquantized)
        for name, tensor in _whole(self.model):
            for hf_name, hf_tensor in self.weight_map.to_hf(name, tensor):
                yield from form.apply(hf_name, hf_tensor)


@attrs.frozen(kw_only=True, eq=False)
class HuggingFaceExport:
    """Writes the policy, in the trainer's precision, as a folder that transformers, vLLM and another run can load."""

    model: nn.Module
    weight_map: WeightMap
    writes: bool
    """True on one rank."""
    tokenizer: Path | None = None
    """The tokenizer.json that goes with it."""
    origin: Path | None = None
    """The checkpoint the run started from, for the tensors that the weight map carries."""
    origin_format: NumberFormat | None = None
    """What decodes it."""

    def collect(self, copies: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take part in making the weights whole, as they are now, in the host memory of the rank that writes.

        `copies` are in host memory already: what this rank holds of each tensor. Empty on ranks that do not write.
        """
        if not self.writes:
            _take_part(self.model)
            return {}
        tensors = self.model.state_dict().items()
        return {name: full(t).cpu() if isinstance(t, DTensor) else copies[name] for name, t in tensors}

    def write(self, whole: Mapping[str, Tensor], checkpoint: Path) -> None:
        """Write what was collected into the folder `huggingface` of a checkpoint, while training goes on."""
        folder = checkpoint / "huggingface"
        shutil.rmtree(folder, ignore_errors=True)
        huggingface.save(
            whole.items(), self.weight_map, folder, origin=self.origin, origin_format=self.origin_format
        )
        if self.tokenizer is not None:
            shutil.copyfile(self.tokenizer, folder / "tokenizer.json")


def _whole(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, full(tensor)) for name, tensor in model.state_dict().items())


def _take_part(model: nn.Module) -> None:
    """What a rank does while another one sees whole tensors."""
    for tensor in model.state_dict().values():
        full(tensor)
