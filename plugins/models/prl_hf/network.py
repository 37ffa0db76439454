"""A model of transformers behind `prl.providers.LanguageModel`.

transformers wants rectangles: packed sequences become rows, padded at their ends. No mask is needed then for any causal
model, attention or not, because nothing real comes after padding.
"""

from __future__ import annotations

from typing import Any

import torch
from prl.blocks import padding
from prl.blocks.context import Context
from prl.errors import UserError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from prl_hf import HfConfig
from prl_hf.cache import LayerCache, PackedCache, check_cacheable, check_used


def build(config: HfConfig, vocab_size: int) -> TransformersModel:
    """The model on the current default device, with fresh weights."""
    model = TransformersModel(bare(config, vocab_size), where=config.checkpoint)
    if not model.head().is_meta:
        _check_head(model, config.checkpoint)
    return model


def bare(config: HfConfig, vocab_size: int) -> Any:
    """What transformers makes of the config.json, in float32, on the current default device; nothing drops out."""
    try:
        known = AutoConfig.from_pretrained(config.checkpoint, trust_remote_code=False, local_files_only=True)
        network = AutoModelForCausalLM.from_config(known, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model.checkpoint: transformers builds no model from {config.checkpoint}: {error}") from error
    rows = network.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise UserError(f"{config.checkpoint}: the model knows {rows} tokens, but the tokenizer has {vocab_size}")
    return network.eval()


class TransformersModel(nn.Module):
    """`network` and how to talk to it in packed tokens."""

    def __init__(self, network: Any, *, where: str) -> None:
        super().__init__()
        self.network = network
        self._where = where
        self._layers = (_layers(network, where),)  # in a tuple, so that it is no second name of the same parameters

    @property
    def layers(self) -> nn.ModuleList:
        """The units of FSDP."""
        return self._layers[0]

    def hidden(self, tokens: Tensor, context: Context) -> Tensor:
        """tokens [T] int64 -> final normed hidden states [T, D]."""
        if context.caches is None:
            layout = padding.bucketed(context.lengths, tokens.device)
            rectangles = zip(layout.pad(tokens), layout.pad(context.positions), strict=True)
            return layout.unpad([self._forward(ids, positions) for ids, positions in rectangles])
        cache = PackedCache(context, tokens.device)
        (ids,) = cache.layout.pad(tokens)
        states = self._forward(
            ids, cache.positions, past_key_values=cache, attention_mask=cache.mask(self.head().dtype), use_cache=True
        )
        check_used(context.caches, self._where)
        return cache.layout.unpad([states])

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """The same as `hidden`, through the module's hooks."""
        return self.hidden(tokens, context)

    def head(self) -> Tensor:
        """The output projection [vocab, D]."""
        weight: Tensor = self.network.get_output_embeddings().weight
        return weight

    def new_caches(self, rows: int, length: int) -> list[Any]:
        """One per layer; UserError for layers that remember something else than every key and value."""
        check_cacheable(self.network.config.get_text_config(), self._where)
        return [LayerCache(rows, length) for _ in self.layers]

    def _forward(self, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
        """ids and positions [S, L] -> [S, L, D]."""
        options = {"use_cache": False, **options}
        states: Tensor = self.network.base_model(input_ids=ids, position_ids=positions, **options)[0]
        return states


def _layers(network: Any, where: str) -> nn.ModuleList:
    """The list of as many modules as the config has layers."""
    count = network.config.get_text_config().num_hidden_layers
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{where}: {type(network).__name__} keeps its {count} layers in no list, so it cannot be divided")


@torch.no_grad()
def _check_head(model: TransformersModel, where: str) -> None:
    """prl computes logits as hidden @ head.T: refuse models that scale, cap or shift them."""
    embedding = model.network.get_input_embeddings().weight
    ids = torch.arange(4, device=embedding.device) % len(embedding)
    theirs = model.network(input_ids=ids[None], use_cache=False).logits[0]
    context = Context(lengths=(4,), positions=torch.arange(4, device=ids.device), longest=4)
    own = model.hidden(ids, context) @ model.head().T
    if not torch.allclose(own, theirs, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{where}: {type(model.network).__name__} does more to its logits than a product with its output "
            "embeddings (a bias, a scale, a cap), which this plugin does not know"
        )
