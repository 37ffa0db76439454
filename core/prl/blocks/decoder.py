"""A decoder-only language model out of blocks: embedding, layers of normed mixers, final norm, output projection.

Model plugins compose it; trainer and engine call it as `prl.providers.LanguageModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, cast, runtime_checkable

import attrs
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prl.blocks.context import Context
from prl.blocks.host_memory import HostMemory
from prl.blocks.linear import Linear
from prl.blocks.norm import RMSNorm


@runtime_checkable
class CachingMixer(Protocol):
    """A mixer that keeps something of earlier tokens while generating."""

    def new_cache(self, rows: int, length: int) -> Any: ...


@runtime_checkable
class SelfInitialised(Protocol):
    """A module with tensors that are no plain matrices: `initialise` lets it set them after all others."""

    def initialise_own(self) -> None: ...


@runtime_checkable
class Preparing(Protocol):
    """A mixer that computes things in the context which layers share, and can do so ahead of a compiled layer."""

    def prepare(self, x: Tensor, context: Context) -> None:
        """`x` is like what the mixer will be given."""


@attrs.frozen
class Sublayer:
    """`x + mixer(norm(x))`, and the names of both modules in the layer: those of the family's checkpoints."""

    norm_name: str
    norm: nn.Module
    mixer_name: str
    mixer: nn.Module
    """`forward(x [T, hidden], context, layer_index) -> [T, hidden]`"""


ALL = "all"


class Layer(nn.Module):
    """Pre-norm residual sublayers, in order: two for a transformer, one for a hybrid of single mixers."""

    def __init__(self, *sublayers: Sublayer) -> None:
        super().__init__()
        self.order = [(sublayer.norm_name, sublayer.mixer_name) for sublayer in sublayers]
        self.recompute: frozenset[str] = frozenset()
        """What the backward pass computes again instead of the forward pass keeping it: kinds of mixers, or `ALL`."""
        self.host: HostMemory | None = None
        """Where the inputs of what is computed again wait for the backward pass; None: on the device."""
        self._run: Callable[[Tensor, Context, int], Tensor] = self.mix
        self._compiled = False
        for sublayer in sublayers:
            self.add_module(sublayer.norm_name, sublayer.norm)
            self.add_module(sublayer.mixer_name, sublayer.mixer)

    def forward(self, x: Tensor, context: Context, layer_index: int) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        if self._compiled:
            self._prepare(x, context)
        if ALL in self.recompute and torch.is_grad_enabled():
            return self._again_in_backward(self._run, x, context, layer_index)
        return self._run(x, context, layer_index)

    def mix(self, x: Tensor, context: Context, layer_index: int) -> Tensor:
        """One sublayer after the other."""
        for norm, mixer in self.order:
            if getattr(getattr(self, mixer), "kind", "") in self.recompute and torch.is_grad_enabled():
                x = self._again_in_backward(self._sublayer, norm, mixer, x, context, layer_index)
            else:
                x = self._sublayer(norm, mixer, x, context, layer_index)
        return x

    def _sublayer(self, norm: str, mixer: str, x: Tensor, context: Context, layer_index: int) -> Tensor:
        added: Tensor = x + getattr(self, mixer)(getattr(self, norm)(x), context, layer_index)
        return added

    def _again_in_backward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Nothing in a layer draws random numbers, so no generator's state is kept."""
        with nullcontext() if self.host is None else self.host.keeping():
            output: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return output

    def mixers(self) -> Iterator[nn.Module]:
        """In order."""
        return (getattr(self, mixer) for _, mixer in self.order)

    def compile_mix(self, **options: Any) -> None:
        """Have torch.compile, with `options`, make one kernel out of many; what layers share is computed outside."""
        self._run, self._compiled = torch.compile(self.mix, **options), True

    def _prepare(self, x: Tensor, context: Context) -> None:
        for mixer in self.mixers():
            if isinstance(mixer, Preparing):
                mixer.prepare(x, context)

    def new_cache(self, rows: int, length: int) -> Any:
        """Of the layer's caching mixer: there is one at most."""
        caching = (mixer for mixer in self.mixers() if isinstance(mixer, CachingMixer))
        return next((mixer.new_cache(rows, length) for mixer in caching), None)


class Decoder(nn.Module):
    """The model. Parameter names are Hugging Face's without the `model.` prefix."""

    def __init__(
        self, *, vocab_size: int, hidden_size: int, layers: Sequence[Layer], norm_eps: float, tied_embeddings: bool
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size, _weight=torch.empty(vocab_size, hidden_size))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.lm_head = None if tied_embeddings else Linear(hidden_size, vocab_size)

    @property
    def shares_prefixes(self) -> bool:
        """Whether every mixer can be given rows that several sequences share (`Context.shared`)."""
        return all(
            getattr(mixer, "shares_prefixes", False) for layer in self.layers for mixer in cast(Layer, layer).mixers()
        )

    def hidden(self, tokens: Tensor, context: Context) -> Tensor:
        """tokens [T] int64 -> final normed hidden states [T, hidden]."""
        x = self.embed_tokens(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, context, index)
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """The same as `hidden`, through the module's hooks."""
        return self.hidden(tokens, context)

    def head(self) -> Tensor:
        """The output projection [vocab, hidden]: `prl.blocks.linear.linear(hidden, head())` gives logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def new_caches(self, rows: int, length: int) -> list[Any]:
        """One per layer, with room for `rows` sequences of `length` tokens."""
        return [cast(Layer, layer).new_cache(rows, length) for layer in self.layers]


@torch.no_grad()
def initialise(model: nn.Module, *, deviation: float = 0.02) -> None:
    """Draw every weight from torch's generator, in the order of the parameters: matrices normal(0, deviation), norms 1.

    0.02 is what transformers does for the families at hand. With query-key norm it learned faster at toy sizes than
    deviations that follow the width or the depth; without it a toy's attention is then nearly uniform and needs more.
    Modules that know better (`SelfInitialised`) have the last word.
    """
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=deviation)
    for module in model.modules():
        if isinstance(module, SelfInitialised):
            module.initialise_own()
