"""Which tensors a worker asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from prl_vllm import release
from prl_vllm.inside.wanted import wanted
from torch import nn

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.shared_experts.up_proj.weight",
    *(f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in range(4)),
    *(f"model.layers.0.mlp.experts.{expert}.up_proj.weight_scale_inv" for expert in range(4)),
)


def asked(*maps: list[int] | None, eplb: bool = False) -> list[str]:
    """Of a worker whose layers have experts at these places, -1 elsewhere."""
    model = nn.ModuleList(nn.Module() for _ in maps)
    for layer, places in zip(model, maps, strict=True):
        layer.expert_map_manager = SimpleNamespace(  # type: ignore[assignment]
            expert_map=None if places is None else torch.tensor(places)
        )
    config = SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=eplb))
    return [name for name in NAMES if wanted(model, config)(name)]


def test_all_where_experts_are_not_divided_or_move() -> None:
    assert asked() == [*NAMES]
    assert asked(None, None) == [*NAMES]
    assert asked([0, 1, -1, -1], eplb=True) == [*NAMES]


@pytest.mark.skipif(release.installed() is None, reason="the rule for names is vLLM's")
def test_matrices_of_the_experts_that_any_layer_has_and_all_that_is_small() -> None:
    others = {f"model.layers.0.mlp.experts.{expert}.up_proj.weight" for expert in (1, 2)}
    assert asked([0, -1, -1, 1]) == [name for name in NAMES if name not in others]
    assert asked([0, -1, -1, 1], [0, 1, -1, -1]) == [name for name in NAMES if not name.endswith(".2.up_proj.weight")]
