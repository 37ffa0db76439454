"""How much a rank did in a step: tokens and FLOPs of its micro-batches, the most memory it held.

FLOPs are those that the documents ask for (`prl.train.flops`): what is computed again does not count, and a beginning
that siblings share counts for each of them. The controller divides by seconds and devices (`prl.dispatch.metrics`).
Called by `prl.train.worker`.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import torch

from prl.compose.config import CostsSection
from prl.errors import UserError
from prl.plan.devices import recognised
from prl.score.costs import BY_TOKENS, Costs
from prl.train.streams import is_scored
from prl.train.survey import Survey
from prl.types import MicroBatch


@attrs.frozen(kw_only=True, eq=False)
class Throughput:
    """Of one rank."""

    survey: Survey
    device: torch.device

    def sums(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Tokens and, unless a module of the model has no count, model FLOPs: to be added over ranks."""
        tokens = float(sum(len(micro.tokens[micro.own]) for micro in micro_batches))
        try:
            return {"throughput/tokens": tokens, "throughput/flops": sum(map(self._flops, micro_batches))}
        except UserError:
            return {"throughput/tokens": tokens}

    def costs(self, longest: int, section: CostsSection) -> Costs:
        """Of a sequence, by its length; by its tokens if a module of the model has no count."""
        try:
            return self.survey.costs(longest, section)
        except UserError:
            return BY_TOKENS

    def values(self) -> dict[str, float]:
        """What the device can do at best, where the table of devices knows it."""
        if self.device.type != "cuda":
            return {}
        device = recognised(torch.cuda.get_device_name(self.device))
        return {} if device is None else {"throughput/peak": device.peak}

    def peaks(self) -> Mapping[str, float]:
        """Most bytes held since the last call (on a CPU: since the process began), the largest rank's to be shown."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return {"memory/peak": float(most)}
        return {"memory/peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT}

    def _flops(self, micro: MicroBatch) -> float:
        lengths = tuple(np.diff(micro.cu_seqlens).tolist())
        layers = zip(self.survey.kinds, self.survey.layer_flops(lengths), strict=True)
        head = self.survey.head_flops(int(is_scored(micro)[micro.own].sum()))
        sharing = 1 if micro.shard is None else micro.shard.count  # ranks that compute the documents together
        return head.model + sum(len(kind.layers) * flops.model for kind, flops in layers) / sharing


_RSS_UNIT = 1.0 if sys.platform == "darwin" else 1024.0
