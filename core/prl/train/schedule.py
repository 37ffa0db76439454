"""The learning rate over the steps of a phase.

Torch-free: the controller computes the rate and sends it with every step, so that trainer ranks keep no schedule state.
"""

from __future__ import annotations

import math

from prl.compose.config import ScheduleSection


def learning_rate(section: ScheduleSection, peak: float, step: int, total: int) -> float:
    """The rate of step `step` (from 1) of a phase of `total` steps.

    Rises linearly over `warmup_steps`, reaching `peak` at the last of them; then stays there (`constant`), or falls
    along half a cosine to `final * peak`, reached at step `total` (`cosine`; Loshchilov & Hutter 2017, arXiv
    1608.03983).

    Example:
        >>> learning_rate(ScheduleSection(type="cosine", warmup_steps=2), 1.0, 1, 10)
        0.5
    """
    if step <= section.warmup_steps:
        return peak * step / section.warmup_steps
    if section.type == "constant":
        return peak
    progress = min((step - section.warmup_steps) / max(total - section.warmup_steps, 1), 1.0)
    share = section.final + (1.0 - section.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * share
