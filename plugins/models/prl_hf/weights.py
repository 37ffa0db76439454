"""Names are transformers' own; a tensor that is tied to another is stored once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from prl.errors import UserError
from torch import Tensor

from prl_hf import HfConfig
from prl_hf.network import bare

_PREFIX = "network."


@attrs.frozen(kw_only=True)
class OwnNames:
    """A `prl.providers.WeightMap`: the module's names without the wrapper's prefix."""

    config: Mapping[str, Any]
    tied: Mapping[str, str]
    """Name -> the name under which the same tensor is stored."""
    carried: tuple[str, ...] = ()

    def to_hf(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        stored = name.removeprefix(_PREFIX)
        return [] if stored in self.tied else [(stored, tensor)]

    def from_hf(self, tensors: Mapping[str, Any], name: str) -> Tensor:
        stored = name.removeprefix(_PREFIX)
        tensor: Tensor = tensors[self.tied.get(stored, stored)]
        return tensor

    def hf_config(self) -> Mapping[str, Any]:
        return self.config


def weight_map(config: HfConfig, vocab_size: int) -> OwnNames:
    """Of the model of this config.json; UserError where transformers stores it otherwise than it holds it."""
    with torch.device("meta"):
        network = bare(config, vocab_size)
    fused = [name for name, parameter in network.named_parameters() if ".experts." in name and parameter.dim() == 3]
    if fused:
        raise UserError(
            f"{config.checkpoint}: transformers holds the experts of {type(network).__name__} fused ({fused[0]}) and "
            "stores them one by one, which this plugin does not know: mixtures of experts need a plugin of their family"
        )
    return OwnNames(config=network.config.to_diff_dict(), tied=_tied(network))


def _tied(network: Any) -> dict[str, str]:
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied
