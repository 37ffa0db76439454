"""What cannot be spread over ranks: anything but data and parameters. Imports no torch."""

from __future__ import annotations

from prl.providers import Limit

from prl_hf import HfConfig

_WHY = "modules of transformers do not know how to share them"


def limits(config: HfConfig, vocab_size: int) -> list[Limit]:
    """The same for every model."""
    return [
        Limit(degree="expert", of="set of experts", count=1, reason=_WHY),
        Limit(degree="tensor", of="set of heads", count=1, reason=_WHY),
        Limit(degree="context", of="sequence", count=1, reason=_WHY),
    ]
