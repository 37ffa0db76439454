"""vLLM's connectors, which move keys and values out of its cache and into it: one, or several as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def each(connector: Any) -> Sequence[Any]:
    """Of `MultiConnector` those that it stands for, on releases that have no public name for them too."""
    several: Sequence[Any] = getattr(connector, "_connectors", [connector])
    return several
