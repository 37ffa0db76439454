"""Plugin `packed_topk`: the indexer's selection without sorting all tokens."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from prl import hookimpl
from prl.compose.config import KernelConfig
from prl.providers import Kernel


@attrs.frozen(kw_only=True)
class PackedTopkConfig(KernelConfig):
    """`[kernels.select_topk]` with `type = "packed"`."""


@hookimpl
def prl_kernels() -> Iterable[Kernel]:
    yield Kernel(
        name="packed",
        config=PackedTopkConfig,
        seam="select_topk",
        summary="the reference's tokens, bit for bit, from a partial selection: up to three times as fast",
        build="prl_packed_topk.kernel:build",
    )
