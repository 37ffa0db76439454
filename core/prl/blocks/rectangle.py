"""torch's attention kernels, of sequences that are equally long."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """q, k, v [S, L, heads, D] -> [S, L, H, D]. Kernels read grouped keys in place; expanding them costs a CPU 20%."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
