"""Qwen3 speaks ChatML. Imports no torch."""

from __future__ import annotations

from prl.providers import Tokenizer
from prl.rollout.chatml import ChatMLRenderer

from prl_qwen3 import Qwen3Config


def renderer(config: Qwen3Config, tokenizer: Tokenizer) -> ChatMLRenderer:
    """The same for every size."""
    return ChatMLRenderer(tokenizer)
