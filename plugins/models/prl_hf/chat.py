"""Models without a format of their own here speak ChatML. Imports no torch."""

from __future__ import annotations

from prl.providers import Tokenizer
from prl.rollout.chatml import ChatMLRenderer

from prl_hf import HfConfig


def renderer(config: HfConfig, tokenizer: Tokenizer) -> ChatMLRenderer:
    """The same for every model."""
    return ChatMLRenderer(tokenizer)
