"""What lies in every row of the caches: which tokens, how many, and whether current weights computed them.

Rows `0 .. sequences - 1` decode (see `batch.py`), the rest hold prompts and kept prefixes (see `prompts.py`). Knows
nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from prl.blocks.context import Context
from prl.providers import LanguageModel
from torch import Tensor

from prl_torch_engine.routes import RouteTable


class Rows:
    """The caches with their bookkeeping.

    Invariant: the first `past[r]` entries of `tokens[r]` are the tokens whose keys and values lie in row `r`, and all
    of them were computed by the weights being served iff `stamps[r] == generation`.
    """

    def __init__(
        self,
        caches: Sequence[Any],
        *,
        count: int,
        length: int,
        device: torch.device,
        routes: RouteTable | None = None,
    ) -> None:
        self.caches = caches
        self.routes = routes
        self.count, self.length = count, length
        self.tokens = torch.zeros(count, length, dtype=torch.int64, device=device)
        self.past = torch.zeros(count, dtype=torch.int64, device=device)
        self.stamps = np.full(count, -1, dtype=np.int64)
        self.generation = 0
        """How often the weights were replaced; a version's number alone could be committed twice."""
        self._places = torch.arange(length, device=device)
        self._divisible = all(cache.prefix_reusable for cache in caches if cache is not None)
        """Otherwise a row is of use whole or not at all: some layer only has the state after its last token."""

    def taken(self, decoding: int) -> float:
        """Share of the caches that the first `decoding` rows hold."""
        return float(self.past[:decoding].sum()) / (self.count * self.length)

    def current(self, row: int) -> bool:
        return bool(self.stamps[row] == self.generation)

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one row into another, of which nothing is left.

        `length` is all of them, or what `longest_prefix` found.
        """
        for cache in self.caches:
            if cache is not None:  # a layer that remembers nothing
                cache.copy_row(source, target, length)
        if self.routes is not None:
            self.routes.copy(source, target, length)
        self.tokens[target, :length] = self.tokens[source, :length]
        self.past[target] = length
        self.stamps[target] = self.stamps[source]

    def hidden(self, model: LanguageModel, tokens: Tensor, context: Context) -> Tensor:
        """The model over new `tokens` [T] of rows -> [T, D]; their routes are kept where somebody wants them."""
        if self.routes is None:
            return model.hidden(tokens, context)
        self.routes.begin(context)
        hidden = model.hidden(tokens, context)
        self.routes.end(context)
        return hidden

    def longest_prefix(self, prompt: Tensor) -> tuple[int, int]:
        """(row, tokens): where the most of `prompt` [P], short of its last token, lies computed by current weights."""
        limit = len(prompt) - 1
        usable = self.stamps == self.generation
        if limit == 0 or not usable.any():
            return 0, 0
        differs = self.tokens[:, :limit] != prompt[:limit].to(self.tokens.device)
        common = self._places[:limit].where(differs, limit).amin(1).minimum(self.past)
        common[torch.from_numpy(~usable)] = 0
        if not self._divisible:
            common[common != self.past] = 0
        row = int(common.argmax())
        return row, int(common[row])
