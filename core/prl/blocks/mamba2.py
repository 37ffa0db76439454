"""Mamba-2: a recurrent mixer with a state per head (Dao and Gu 2024, arXiv:2405.21060).

    h[t] = exp(-exp(A_log) dt[t]) h[t-1] + dt[t] B[t] x[t]^T          one decay per head
    y[t] = C[t] h[t] + D x[t]                                        B and C shared by the heads of a group

A short causal convolution comes before, a gate and a norm per group after. Sequences are computed as rectangles, in
chunks: inside a chunk as attention with decays, from chunk to chunk through the state. Every sequence has a state of
its own, so documents never see each other. `dt`, the decays and the state are float32 in every number format.

Where ranks share a sequence, each scans its tokens from a state of zero; what a rank's tokens leave, and how much of
what came before them is left, then goes round, and every rank adds what the ranks before it left. This is exact.

Its cache holds the state after a row's last token and the convolution's last inputs, nothing per token: it cannot be
cut back to a prefix.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from prl.blocks import padding
from prl.blocks.attend import layouts
from prl.blocks.context import Context, SequenceShard
from prl.blocks.kernels import seam
from prl.blocks.linear import Linear
from prl.blocks.norm import rms_norm
from prl.errors import RunError

_STEP_RANGE = (1e-3, 1e-1)
"""Between which `dt` starts, as in the published initialisation."""


@attrs.frozen(kw_only=True)
class MambaSizes:
    """Sizes of a Mamba-2 layer."""

    heads: int
    head_dim: int
    groups: int
    """Heads of a group share B and C; so do the channels of a group its norm."""
    state: int
    """Size of the state per channel."""
    kernel: int
    """Inputs the convolution sees."""
    chunk: int
    """Tokens computed at once; changes no result."""

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels of [x | B | C]."""
        return self.inner + 2 * self.groups * self.state


class RecurrentCache:
    """What a Mamba-2 layer remembers of `rows` sequences of any length."""

    prefix_reusable: ClassVar[bool] = False

    def __init__(self, sizes: MambaSizes, *, rows: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.inputs = torch.zeros(rows, sizes.kernel - 1, sizes.convolved, dtype=dtype, device=device)
        self.state = torch.zeros(rows, sizes.heads, sizes.head_dim, sizes.state, device=device, dtype=torch.float32)

    def read(self, context: Context) -> tuple[Tensor, Tensor]:
        """[S, kernel - 1, convolved] last inputs and [S, H, P, N] state; zeros for a sequence that begins."""
        assert context.past is not None, "a context with caches has past"
        inputs, state = self.inputs[context.rows], self.state[context.rows]
        if context.past_min > 0:
            return inputs, state
        begins = context.past == 0
        return inputs.masked_fill(begins[:, None, None], 0.0), state.masked_fill(begins[:, None, None, None], 0.0)

    def write(self, inputs: Tensor, state: Tensor, context: Context) -> None:
        """The reverse of `read`."""
        self.inputs[context.rows] = inputs
        self.state[context.rows] = state

    def copy_row(self, source: int, target: int, length: int) -> None:
        """One row into another; `length` must be the number of tokens the row's state has seen."""
        self.inputs[target] = self.inputs[source]
        self.state[target] = self.state[source]


class CausalConvolution(nn.Module):
    """Every channel on its own: y[t] = bias + sum over k of weight[k] x[t - K + 1 + k], then SiLU."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    def initialise_own(self) -> None:
        """As torch does it: uniform, by the number of inputs."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x [S, K - 1 + L, C] -> [S, L, C]."""
        return causal_conv(x, self.weight[:, 0], self.bias)


class GroupedNorm(nn.Module):
    """Root-mean-square norm over each group's channels."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        """x [T, size] -> the same shape."""
        weight = torch.unflatten(self.weight, 0, (self.groups, -1)).to(x.dtype)
        return rms_norm(torch.unflatten(x, 1, (self.groups, -1)), weight, self.eps).flatten(1)


class Mamba2(nn.Module):
    """A mixer."""

    kind: ClassVar[str] = "mamba"

    def __init__(self, sizes: MambaSizes, *, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.sizes = sizes
        self.in_proj = Linear(hidden_size, sizes.inner + sizes.convolved + sizes.heads)
        self.conv1d = CausalConvolution(sizes.convolved, sizes.kernel)
        self.dt_bias = nn.Parameter(torch.empty(sizes.heads))
        self.A_log = nn.Parameter(torch.empty(sizes.heads))
        self.D = nn.Parameter(torch.empty(sizes.heads))
        self.norm = GroupedNorm(sizes.inner, sizes.groups, norm_eps)
        self.out_proj = Linear(sizes.inner, hidden_size)

    def initialise_own(self) -> None:
        """Decays 1, 2, ... per unit of `dt`, and `dt` spread between `_STEP_RANGE` on a logarithmic scale."""
        self.A_log.copy_(torch.arange(1, self.sizes.heads + 1).log())
        self.D.fill_(1.0)
        low, high = map(math.log, _STEP_RANGE)
        steps = (torch.rand(self.sizes.heads, device=self.dt_bias.device) * (high - low) + low).exp()
        self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives `steps` back

    def forward(self, x: Tensor, context: Context, layer_index: int) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        sizes = self.sizes
        gate, inputs, dt = self.in_proj(x).split((sizes.inner, sizes.convolved, sizes.heads), 1)
        dt = functional.softplus(dt.float() + self.dt_bias.float())
        cache: RecurrentCache | None = None if context.caches is None else context.caches[layer_index]
        if cache is not None and context.decoding:
            mixed = self._one_token(inputs, dt, context, cache)
        elif cache is not None:
            mixed = self._continued(inputs, dt, context, cache)
        else:
            mixed = self._from_the_start(inputs, dt, context)
        normed = self.norm(mixed.flatten(1) * functional.silu(gate.float())).to(x.dtype)
        projected: Tensor = self.out_proj(normed)
        return projected

    def prepare(self, x: Tensor, context: Context) -> None:
        """Compute ahead what layers share (`prl.blocks.decoder.Preparing`)."""
        layouts(context)

    def new_cache(self, rows: int, length: int) -> RecurrentCache:
        """For `rows` sequences, where the weights are; the length does not matter."""
        weight = self.in_proj.weight
        return RecurrentCache(self.sizes, rows=rows, dtype=weight.dtype, device=weight.device)

    def _from_the_start(self, inputs: Tensor, dt: Tensor, context: Context) -> Tensor:
        """inputs [T, convolved], dt [T, H] -> [T, H, P]."""
        if context.shard is not None:
            return self._shared(inputs, dt, context, context.shard)
        layout, _ = layouts(context)
        rectangles = []
        for part, steps in zip(layout.pad(inputs), layout.pad(dt), strict=True):
            convolved = self.conv1d(functional.pad(part, (0, 0, self.sizes.kernel - 1, 0)))
            rectangles.append(self._scan(convolved, steps, None)[0])
        unpadded: Tensor = layout.unpad(rectangles)
        return unpadded

    def _shared(self, inputs: Tensor, dt: Tensor, context: Context, shard: SequenceShard) -> Tensor:
        """The same where the first sequence goes on from earlier ranks, and the last may go on in later ones.

        Both have rectangles of their own, so nothing pads them: their final states are what the next rank needs.
        """
        layout, _ = layouts(context)
        parts, steps = list(layout.pad(inputs)), list(layout.pad(dt))
        before = _inputs_before(inputs, context, shard, self.sizes.kernel - 1)
        zeros = functools.partial(functional.pad, pad=(0, 0, self.sizes.kernel - 1, 0))
        convolved = [self.conv1d(torch.cat((before, parts[0]), 1)), *(self.conv1d(zeros(part)) for part in parts[1:])]
        scanned = [self._scan(*part, None) for part in zip(convolved, steps, strict=True)]
        last = min(len(context.lengths), 2) - 1  # the rectangle of the last sequence
        state = _state_before(scanned[last][1], steps[last], self._decay(), context, shard)
        mixed = [output for output, _ in scanned]
        mixed[0] = mixed[0] + self._read(convolved[0], steps[0], state)
        unpadded: Tensor = layout.unpad(mixed)
        return unpadded

    def _read(self, convolved: Tensor, dt: Tensor, state: Tensor) -> Tensor:
        """What a state [1, H, P, N] before the first token adds: convolved [1, L, convolved], dt [1, L, H] ->
        [1, L, H, P]."""
        _, _, c = self._parts(convolved)
        grouped = torch.unflatten(state, 1, (self.sizes.groups, -1))
        read = torch.einsum("slgn,sghpn->slghp", c, grouped).flatten(2, 3)
        return read * (dt * self._decay()).cumsum(1).exp()[..., None]

    def _continued(self, inputs: Tensor, dt: Tensor, context: Context, cache: RecurrentCache) -> Tensor:
        """The same after what lies in the cache; padding must leave the state as it is, so its `dt` is zero."""
        layout = padding.square(context.lengths, inputs.device)
        lengths = torch.tensor(context.lengths, device=inputs.device)
        last_inputs, state = cache.read(context)
        (new_inputs,), (steps,) = layout.pad(inputs), layout.pad(dt)
        seen = torch.cat((last_inputs, new_inputs), 1)  # [S, kernel - 1 + L, convolved]
        real = torch.arange(steps.shape[1], device=steps.device) < lengths[:, None]
        mixed, state = self._scan(self.conv1d(seen), steps * real[..., None], state)
        last = lengths[:, None] + torch.arange(self.sizes.kernel - 1, device=lengths.device)
        cache.write(seen.gather(1, last[..., None].expand(-1, -1, seen.shape[2])), state, context)
        unpadded: Tensor = layout.unpad([mixed])
        return unpadded

    def _scan(self, convolved: Tensor, dt: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """convolved [S, L, convolved], dt [S, L, H] -> [S, L, H, P], final state [S, H, P, N]."""
        x, b, c = self._parts(convolved)
        mixed, state = ssd_scan(x, dt, self._decay(), b, c, chunk=self.sizes.chunk, state=state)
        return mixed + self.D.float()[:, None] * x, state

    def _one_token(self, inputs: Tensor, dt: Tensor, context: Context, cache: RecurrentCache) -> Tensor:
        """inputs [S, convolved], dt [S, H] -> [S, H, P]: the recurrence itself."""
        last_inputs, state = cache.read(context)
        seen = torch.cat((last_inputs, inputs[:, None]), 1)
        x, b, c = (part[:, 0] for part in self._parts(self.conv1d(seen)))
        per_group = (self.sizes.groups, self.sizes.heads // self.sizes.groups)
        stepped = torch.unflatten(x * dt[..., None], 1, per_group)
        added = stepped[..., None] * b[:, :, None, None]  # [S, G, H / G, P, N]
        state = torch.addcmul(added.flatten(1, 2), state, (dt * self._decay()).exp()[..., None, None])
        cache.write(seen[:, 1:], state, context)
        read = torch.matmul(torch.unflatten(state, 1, per_group), c[:, :, None, :, None])[..., 0].flatten(1, 2)
        return torch.addcmul(read, self.D.float()[:, None], x)

    def _parts(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., convolved] -> x [..., H, P], B and C [..., G, N], float32."""
        sizes = self.sizes
        shared = sizes.groups * sizes.state
        x, b, c = torch.split(convolved.float(), [sizes.inner, shared, shared], -1)
        per_group = (sizes.groups, sizes.state)
        return (
            torch.unflatten(x, -1, (sizes.heads, sizes.head_dim)),
            torch.unflatten(b, -1, per_group),
            torch.unflatten(c, -1, per_group),
        )

    def _decay(self) -> Tensor:
        """[H] per unit of `dt`, negative."""
        return -self.A_log.float().exp()


@seam
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [S, K - 1 + L, C], weight [C, K], bias [C] -> silu(y) [S, L, C].

    y[t] = bias + sum over k of weight[k] x[t + k]
    """
    mixed = functional.conv1d(x.transpose(1, 2), weight[:, None], bias, groups=len(bias))
    return functional.silu(mixed.transpose(1, 2))


@seam
def ssd_scan(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, *, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence over rectangles, without D: the reference of the kernel (section 6 of the paper).

    x [S, L, H, P], dt [S, L, H], decay [H] negative, b and c [S, L, G, N], state [S, H, P, N] before the first token
    (None: zeros), all float32 -> y [S, L, H, P], the state after the last token. A token with dt = 0 changes nothing.
    """
    length, groups = x.shape[1], b.shape[2]
    chunk = min(chunk, length)
    x, dt, b, c = (_chunked(t, chunk) for t in (x, dt, b, c))
    faded = (dt * decay).transpose(2, 3).cumsum(3)  # [S, chunks, H, chunk] logarithm of the decay since the chunk began
    inputs = (x * dt[..., None]).transpose(2, 3)  # [S, chunks, H, chunk, P]
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # [S, chunks, G, chunk, N]
    between = faded[..., :, None] - faded[..., None, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    weights = _by_group(between.masked_fill(later, float("-inf")).exp(), groups) * (c @ b.mT)[:, :, :, None]
    inside = weights.flatten(2, 3) @ inputs
    to_end = (faded[..., -1:] - faded).exp()[..., None] * inputs  # what each input leaves at the end of its chunk
    added = (_by_group(to_end.mT, groups) @ b[:, :, :, None]).flatten(2, 3)  # [S, chunks, H, P, N]
    before, state = _pass_on(added, faded[..., -1].exp(), state)
    across = (c[:, :, :, None] @ _by_group(before, groups).mT).flatten(2, 3) * faded.exp()[..., None]
    return (inside + across).transpose(2, 3).flatten(1, 2)[:, :length], state


def _pass_on(added: Tensor, fading: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """added [S, chunks, H, P, N], fading [S, chunks, H] -> the state before every chunk, the state after the last."""
    state = torch.zeros_like(added[:, 0]) if state is None else state
    before = []
    for index in range(added.shape[1]):
        before.append(state)
        state = torch.addcmul(added[:, index], state, fading[:, index, :, None, None])
    return torch.stack(before, 1), state


def _chunked(t: Tensor, chunk: int) -> Tensor:
    """[S, L, ...] -> [S, chunks, chunk, ...], zeros in the end of the last."""
    missing = -t.shape[1] % chunk
    padded = functional.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) if missing else t
    return torch.unflatten(padded, 1, (-1, chunk))


def _by_group(t: Tensor, groups: int) -> Tensor:
    """[S, chunks, H, ...] -> [S, chunks, G, H / G, ...]."""
    return torch.unflatten(t, 2, (groups, -1))


# --- from rank to rank ------------------------------------------------------------------------------------------------
# Every rank uses all of what a collective brings, if only times zero: its backward is a collective too.
def _inputs_before(inputs: Tensor, context: Context, shard: SequenceShard, count: int) -> Tensor:
    """inputs [T, C] -> [1, count, C]: the inputs of the first sequence before this rank's, zeros before its start."""
    if len(inputs) < count:
        raise RunError(f"a rank has {len(inputs)} tokens, and the convolution looks back on {count}")
    ends = torch.unflatten(shard.whole(inputs[len(inputs) - count :]), 0, (shard.count, count))
    before = torch.arange(count, device=inputs.device) >= count - context.earlier
    return ends[shard.index - 1 : shard.index or None] * before[:, None]


def _state_before(added: Tensor, dt: Tensor, decay: Tensor, context: Context, shard: SequenceShard) -> Tensor:
    """The state [1, H, P, N] in which earlier ranks leave this rank's first sequence.

    `added` [1, H, P, N] is the state after this rank's last sequence had it begun here, dt [1, L, H] are its steps.
    """
    alone = len(context.lengths) == 1
    left = (dt * decay).sum(1).exp() * float(alone)  # [1, H], of what came before this rank
    states, lefts = shard.whole(added), shard.whole(left)
    state = states[:1] * 0.0 + lefts[:1, :, None, None] * 0.0
    first = shard.index - -(-context.earlier // len(context.positions))  # the rank where the sequence begins
    for rank in range(first, shard.index):
        state = torch.addcmul(states[rank : rank + 1], lefts[rank : rank + 1, :, None, None], state)
    return state
