"""A rank's shards become whole tensors under their published names, one at a time.

Every rank walks the model in the same order, because making a sharded tensor whole is a collective; rank 0 hands what
it sees to the weight transport. Called by `prl.train.worker`.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from torch import Tensor, nn

from prl.providers import NumberFormat, WeightMap, WeightSender
from prl.train.parallel import full
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
    """Endings of the names of module tensors that travel as they are."""

    def publish(self, version: int) -> Manifest | None:
        """Take part in sending `version`; the manifest on the rank that publishes."""
        if self.sender is not None:
            return self.sender.send(version, self._tensors())
        for tensor in self.model.state_dict().values():
            full(tensor)
        return None

    def retire(self, version: int) -> None:
        if self.sender is not None:
            self.sender.retire(version)

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            for hf_name, hf_tensor in self.weight_map.to_hf(name, full(tensor)):
                if name.endswith(self.float32):
                    yield hf_name, hf_tensor
                else:
                    yield from self.number_format.export(hf_name, hf_tensor)
