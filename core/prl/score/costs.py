"""What it costs to train on a sequence, by its length: what bins are balanced by.

A trainer rank computes it from its model's FLOPs (`prl.train.survey`) and says it in its Hello; the controller, which
has no model, packs by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np


def _as_many(costs: Costs, attribute: attrs.Attribute[Sequence[float]], of_lengths: Sequence[float]) -> None:
    lengths = costs.lengths
    if len(of_lengths) != len(lengths) or len(lengths) < 2 or list(lengths) != sorted({*lengths}):
        raise ValueError(f"needs two lengths at least, ascending, with a cost each: {lengths}, {of_lengths}")


@attrs.frozen
class Costs:
    """A curve through points; beyond the last it goes on as between the last two.

    Example:
        >>> Costs((0, 10, 20), (0.0, 10.0, 40.0)).of([5, 20, 30])
        [5.0, 40.0, 70.0]
    """

    lengths: tuple[int, ...]
    """Ascending."""
    of_lengths: tuple[float, ...] = attrs.field(validator=_as_many)
    """Of a sequence of each length; in any unit."""

    def of(self, lengths: Sequence[int]) -> list[float]:
        """Of sequences of these lengths."""
        inside = np.interp(lengths, self.lengths, self.of_lengths)
        slope = (self.of_lengths[-1] - self.of_lengths[-2]) / (self.lengths[-1] - self.lengths[-2])
        beyond = np.maximum(np.asarray(lengths) - self.lengths[-1], 0)
        found: list[float] = (inside + slope * beyond).tolist()
        return found


BY_TOKENS = Costs((0, 1), (0.0, 1.0))
"""Every token costs the same."""


def points(longest: int, *, most: int = 64) -> list[int]:
    """Lengths from 0 to `longest`, the closer to each other the shorter: between them a parabola is almost straight."""
    return sorted({round(longest * (i / most) ** 2) for i in range(most + 1)} | {0, 1, max(longest, 1)})
