"""Routes in an engine whose prompts are computed by another, on GPUs and releases that refuse the two together.

vLLM 0.26 refuses `--enable-return-routed-experts` beside any connector (`vllm/config/vllm.py`, VllmConfig), because
who samples does not know the routes of a prompt that another engine computed. Here they come from the engine
that computed it, and such prompts share prefixes only with each other (`prl_vllm/handover.py`); what is asked of vLLM
is what it computed itself. Tiers stay refused: their blocks come back into other slots of vLLM's table of routes. It
goes when the oldest supported release refuses no more; 0.32 does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prl_vllm.inside.mends import wrap

FLAG = "enable_return_routed_experts"


def install() -> None:
    """The refusal is not asked where NIXL is the only connector."""
    from vllm.config import VllmConfig

    wrap(VllmConfig, "__post_init__", unrefused)


def unrefused(check: Callable[..., None]) -> Callable[..., None]:
    """Around `VllmConfig.__post_init__`."""

    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        model, transfer = self.model_config, self.kv_transfer_config
        if not (getattr(model, FLAG, False) and getattr(transfer, "kv_connector", None) == "NixlConnector"):
            check(self, *args, **kwargs)
            return
        setattr(model, FLAG, False)
        try:
            check(self, *args, **kwargs)
        finally:
            setattr(model, FLAG, True)

    return post_init
