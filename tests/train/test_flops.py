"""Own counts against torch's counter, which looks at the shapes of the products that are really computed.

The counter counts what runs, on rectangles: all pairs of a document, also those a causal mask hides, as many selected
tokens for a document's first as for its last, and values padded to the size of the keys. `Everything` counts pairs the
same way; what then differs is stated. Nothing is computed: the models are fake tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prl.blocks.context import Context
from prl.blocks.dsa import Indexer
from prl.blocks.mla import MultiHeadLatentAttention
from prl.errors import UserError
from prl.train.flops import Flops, Packed, count, model_flops, total
from prl.train.logprobs import token_scores
from prl_glm5 import Glm51Config, Glm52Config
from prl_glm5.network import build as glm5
from prl_kimi_k2 import KimiK27Config
from prl_kimi_k2.network import build as kimi_k2
from prl_nemotron3 import NanoConfig, UltraConfig
from prl_nemotron3.network import build as nemotron3
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build as qwen3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

LENGTHS, SCORED = (64, 64), 100
CASES: dict[str, tuple[Any, Any]] = {
    "qwen3": (qwen3, Qwen3Config()),
    "qwen3 with experts": (qwen3, Qwen3Config(experts=8)),
    "glm-5.1 dense attention": (glm5, Glm51Config()),
    "glm-5.1 sparse attention": (glm5, Glm51Config(index_top_k=16)),
    "glm-5.2 shared selection": (glm5, Glm52Config(index_top_k=16)),
    "kimi-k2.7": (kimi_k2, KimiK27Config()),
    "nemotron-3-ultra": (nemotron3, UltraConfig()),
    "nemotron-3-nano": (nemotron3, NanoConfig()),
}


class Everything(Packed):
    """All pairs of a document."""

    @property
    def pairs(self) -> int:
        return sum(n * n for n in self.lengths)

    def pairs_within(self, most: int) -> int:
        return sum(n * min(n, most) for n in self.lengths)


def grouped_product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """a [N, D] by b [E, D, O], or for the weights [D, N] by [N, O]: torch's counter knows no grouped products."""
    return 2 * int(a[0]) * int(a[1]) * int(b[-1])


def computed(build: Any, config: Any) -> tuple[nn.Module, FlopCounterMode, int]:
    """The model, what torch counted in one forward and backward, and in the forward pass of the hidden states."""
    model = build(config, 64)
    tokens = torch.zeros(sum(LENGTHS), dtype=torch.int64)
    context = Context(lengths=LENGTHS, positions=tokens, longest=max(LENGTHS))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_product})
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter looks into no fused kernel of a CPU
        hidden = model.hidden(tokens, context)
        forward = counter.get_total_flops()
        rows = tokens[:SCORED]
        scores = token_scores(
            hidden[:SCORED], model.head(), targets=rows, temperatures=torch.ones(SCORED), chunk=32, entropy=False
        )
        scores.logprobs.sum().backward()
    return model, counter, forward


def of_padded_values(model: nn.Module) -> int:
    """Forward: a fused kernel wants values as wide as keys, and latents are fetched whole."""
    packed, padded = Everything(LENGTHS), 0
    for module in model.modules():
        if isinstance(module, MultiHeadLatentAttention):
            sizes, pairs, width = module.sizes, packed.pairs, module.sizes.qk_dim - module.sizes.value_dim
            if selects(module):
                pairs, width = packed.pairs_within(module.indexer.top_k), sizes.rope_dim
            padded += 2 * pairs * sizes.heads * width
    return padded


def selects(layer: MultiHeadLatentAttention) -> bool:
    return layer.indexer is not None and layer.indexer.top_k < max(LENGTHS)


def of_convolutions(counter: FlopCounterMode) -> int:
    """Backward: torch counts a convolution of every channel on its own as if channels mixed."""
    return counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution_backward, 0)


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_torch(name: str) -> None:
    torch.set_default_dtype(torch.bfloat16)  # the only type torch traces grouped products of
    try:
        with FakeTensorMode():
            model, counter, forward = computed(*CASES[name])
            own = model_flops(model, Everything(LENGTHS), scored=SCORED)
    finally:
        torch.set_default_dtype(torch.float32)
    padded = of_padded_values(model)
    assert sum(own.forward.values()) - own.forward["head"] == forward - padded
    convolutions = 2 * sum(
        2 * sum(LENGTHS) * module.weight.numel() for module in model.modules() if "Convolution" in type(module).__name__
    )
    # Attention without a fused kernel keeps its scores; that over selected tokens computes them again.
    layers = [module for module in model.modules() if isinstance(module, MultiHeadLatentAttention)]
    again = own.recompute["attention"] if any(selects(layer) for layer in layers) else 0
    executed = own.model + own.recompute["head"] + again
    assert executed - convolutions == counter.get_total_flops() - 3 * padded - of_convolutions(counter)


def test_pairs_are_causal_within_documents() -> None:
    packed = Packed((5, 1, 3))
    assert packed.pairs == 15 + 1 + 6
    assert packed.pairs_within(2) == (1 + 2 + 2 + 2 + 2) + 1 + (1 + 2 + 2)
    assert packed.pairs_within(5) == packed.pairs


def attention_layer(build: Any, config: Any) -> MultiHeadLatentAttention:
    with torch.device("meta"):
        model = build(config, 64)
    return next(module for module in model.modules() if isinstance(module, MultiHeadLatentAttention))


def test_selected_tokens_cost_absorbed_heads_and_all_others_an_index() -> None:
    layer = attention_layer(glm5, Glm51Config(index_top_k=16))
    sizes, packed = layer.sizes, Packed((40,))
    flops = count(layer, packed)
    seen = 16 * 17 // 2 + 24 * 16
    assert flops.forward["attention"] == 2 * seen * sizes.heads * (2 * sizes.kv_rank + sizes.rope_dim)
    assert isinstance(layer.indexer, Indexer)
    assert flops.forward["index"] == 2 * (40 * 41 // 2) * layer.indexer.heads * (layer.indexer.head_dim + 1)
    assert "index" not in flops.backward


def test_short_documents_are_attended_to_whole() -> None:
    layer = attention_layer(glm5, Glm51Config(index_top_k=16))
    sizes, flops = layer.sizes, count(layer, Packed((16, 16)))
    assert "index" not in flops.forward
    assert flops.forward["attention"] == 2 * 2 * 136 * sizes.heads * (sizes.qk_dim + sizes.value_dim)


def test_a_frozen_matrix_only_passes_gradients_on() -> None:
    trained, frozen = nn.Linear(4, 6), nn.Linear(4, 6).requires_grad_(False)
    assert count(trained, Packed((3,))).backward == {"dense": 2 * 2 * 3 * 24}
    assert count(frozen, Packed((3,))).backward == {"dense": 2 * 3 * 24}


def test_checkpointing_repeats_the_forward_pass_and_changes_no_model_flops() -> None:
    flops = Flops({"dense": 10, "attention": 4}, {"dense": 20, "attention": 8}, {"attention": 2})
    assert flops.checkpointed().recompute == {"dense": 10, "attention": 6}
    assert flops.checkpointed().model == flops.model == 42
    assert flops.checkpointed().executed == 58
    assert total([flops, flops]).scaled(0.5) == flops


def test_a_matrix_that_nobody_counts_is_an_error() -> None:
    with pytest.raises(UserError, match="no FLOP count for Bilinear"):
        count(nn.Sequential(nn.Bilinear(2, 2, 2)), Packed((3,)))
