"""What `prl replay` asks of the process in charge of a replay, and what it is told; files of the replay's directory."""

from __future__ import annotations

import attrs

from prl.replay.compare import Difference

ORDER, REPORT = "order.json", "report.json"


@attrs.frozen(kw_only=True)
class Order:
    """`order.json`: which launch to re-enact."""

    run: str
    """The run directory it is from."""
    launch: int
    log: str
    end: int
    """Last step."""
    followed_by: str
    """Log of the launch that continued from the checkpoint of step `end`; empty: none that counts."""
    checkpoint: str
    """Where the replay of that one will start from."""
    tell: bool
    """Print every step."""


@attrs.frozen(kw_only=True)
class Report:
    """`report.json`: what came of it."""

    trained: int
    """Newest step whose batch and weights are equal; the step that the launch began with, where there is none."""
    weights: int
    """Published sets of weights that were compared, and are equal."""
    difference: Difference | None = None
    error: str = ""
    """Why it ended early, where it did."""
