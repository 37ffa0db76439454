"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

Two conventions say which dimensions turn together: halves (i with i + D/2, the default) and interleaved (2i with
2i + 1, DeepSeek's). Frequencies may be stretched for contexts longer than those of pretraining (`Yarn`).
"""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch
from torch import Tensor

from prl.blocks.context import Context


@attrs.frozen
class Tables:
    """What `rotate` multiplies with, for the tokens of one forward pass."""

    cos: Tensor  # [T, 1, D]
    sin: Tensor  # [T, 1, D], negated in the first of two dimensions that turn together
    interleaved: bool = False


@attrs.frozen(kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071) as DeepSeek-V3 and Kimi-K2 use it.

    Their `mscale` equals their `mscale_all_dim`, so the tables keep their size and the whole correction of attention's
    temperature lies in `softmax_factor`.
    """

    factor: float
    """Length of context over that of pretraining."""
    original_length: int
    """Tokens of context in pretraining."""
    beta_fast: float = 32.0
    """Dimensions with more turns than this in `original_length` keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions with fewer turns than this are slowed down by `factor`."""
    mscale: float = 1.0

    @property
    def softmax_factor(self) -> float:
        """What the scale of attention is multiplied with."""
        return (0.1 * self.mscale * math.log(self.factor) + 1.0) ** 2 if self.factor > 1 else 1.0

    def stretched(self, frequencies: Tensor, theta: float) -> Tensor:
        """frequencies [D/2], fastest first -> the same, the slow ones slowed down."""
        pairs = len(frequencies)
        low = max(math.floor(self._pair(self.beta_fast, theta, pairs)), 0)
        high = min(math.ceil(self._pair(self.beta_slow, theta, pairs)), 2 * pairs - 1)
        places = torch.arange(pairs, device=frequencies.device, dtype=torch.float32)
        kept = 1 - ((places - low) / max(high - low, 1e-3)).clamp(0, 1)
        return frequencies / self.factor * (1 - kept) + frequencies * kept

    def _pair(self, turns: float, theta: float, pairs: int) -> float:
        """Which pair of dimensions turns this often in `original_length`."""
        return pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)


@attrs.frozen
class RotaryEmbedding:
    """One set of frequencies; layers that share it share its tables through the context."""

    head_dim: int
    theta: float
    interleaved: bool = False
    yarn: Yarn | None = None
    _key: str = attrs.field(init=False, eq=False, repr=False)
    """Equal for equal frequencies; a compiler follows a string where it would not follow an object."""
    _known: dict[Any, Tensor] = attrs.field(factory=dict, init=False, eq=False, repr=False)
    """(device, dtype) -> [N, 2, D] tables of the first N positions: decoding looks up, it does not compute."""

    @_key.default
    def _default_key(self) -> str:
        return f"rope {self.head_dim} {self.theta} {self.interleaved} {self.yarn}"

    def tables(self, context: Context, dtype: torch.dtype) -> Tables:
        """For the context's tokens. Angles are computed in float32."""
        key = (self._key, dtype)
        if key not in context.memo:
            positions = context.positions
            rows = self._first(context.longest, positions.device, dtype).index_select(0, positions)
            context.memo[key] = Tables(rows[:, :1], rows[:, 1:], self.interleaved)
        tables: Tables = context.memo[key]
        return tables

    def _first(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[>= count, 2, D]; grows by doubling."""
        key = (device, dtype)
        if key not in self._known or len(self._known[key]) < count:
            positions = torch.arange(max(256, 2 ** (count - 1).bit_length()), device=device, dtype=torch.float32)
            angles = positions[:, None] * self._frequencies(device)
            cos, sin = angles.cos(), angles.sin()
            self._known[key] = torch.stack((self._paired(cos, cos), self._paired(-sin, sin)), 1).to(dtype)
        return self._known[key]

    def _frequencies(self, device: torch.device) -> Tensor:
        """[D/2] radians per position."""
        exponents = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        frequencies: Tensor = 1.0 / self.theta**exponents
        return frequencies if self.yarn is None else self.yarn.stretched(frequencies, self.theta)

    def _paired(self, first: Tensor, second: Tensor) -> Tensor:
        """What the two dimensions of every pair are given, [N, D/2] each -> [N, D]."""
        return torch.stack((first, second), -1).flatten(-2) if self.interleaved else torch.cat((first, second), -1)


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """x [T, H, D] -> the same shape, every head turned by its token's angles."""
    if torch.compiler.is_compiling():
        return _rotate_apart(x, tables)
    if tables.interleaved:
        partners = torch.unflatten(x, -1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partners = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * tables.cos, partners, tables.sin)


def _rotate_apart(x: Tensor, tables: Tables) -> Tensor:
    """The same, the two dimensions of every pair apart: torch compiles it to vectors, where `roll` becomes a remainder
    for every element (a third of a small layer's backward pass). Without a compiler it takes half as long again."""
    first, second = _apart(x, tables.interleaved)
    cos, sin = _apart(tables.cos, tables.interleaved)[0], _apart(tables.sin, tables.interleaved)[1]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if tables.interleaved else torch.cat(turned, -1)


def _apart(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[..., D] -> the first and the second dimensions of all pairs, [..., D/2] each."""
    first, second = torch.unflatten(x, -1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    return first, second
