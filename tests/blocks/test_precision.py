from __future__ import annotations

import torch
from prl.blocks import precision
from prl.blocks.moe import SigmoidRouter
from torch import nn


def test_named_tensors_stay_exact() -> None:
    """A correction of 40 and a bit keeps its bit; `nn.Module.to` would have rounded it."""
    model = nn.ModuleDict({"gate": SigmoidRouter(hidden_size=4, experts=3, experts_per_token=1, scale=1.0)})
    model.register_buffer("count", torch.tensor([2**30 + 1]))
    bias = torch.tensor([40.0, 40.0 + 2**-12, 40.0 + 2**-10])
    model.get_buffer("gate.e_score_correction_bias").copy_(bias)
    precision.cast(model, torch.bfloat16, float32=("correction_bias",))
    assert torch.equal(model.get_buffer("gate.e_score_correction_bias"), bias)
    assert model.get_parameter("gate.weight").dtype is torch.bfloat16
    assert model.get_buffer("count").tolist() == [2**30 + 1]
    assert model.get_parameter("gate.weight").requires_grad


def test_without_names_all_are_cast() -> None:
    model = nn.Linear(2, 3)
    precision.cast(model, torch.float64)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}
