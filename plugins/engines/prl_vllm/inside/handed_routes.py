"""Routes beside connectors, on GPUs and releases that refuse the two together.

vLLM 0.26 refuses `--enable-return-routed-experts` beside any connector (`vllm/config/vllm.py`, VllmConfig), because
who samples does not know the routes of a prompt that another engine computed, nor of a block that a tier kept. Here the
former come from the engine that computed it, and such prompts share prefixes only with each other
(`prl_vllm/handover.py`); the latter come from the tier (`carried_routes.py`). It goes when the oldest supported release
refuses no more; 0.32 does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prl_vllm.inside.mends import wrap

FLAG = "enable_return_routed_experts"
SOUND = frozenset({"NixlConnector", "OffloadingConnector"})


def install() -> None:
    """The refusal is not asked where NIXL and tiers are the only connectors."""
    from vllm.config import VllmConfig

    wrap(VllmConfig, "__post_init__", unrefused)


def unrefused(check: Callable[..., None]) -> Callable[..., None]:
    """Around `VllmConfig.__post_init__`."""

    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        model = self.model_config
        connectors = _connectors(self.kv_transfer_config)
        if not (getattr(model, FLAG, False) and connectors and connectors <= SOUND):
            check(self, *args, **kwargs)
            return
        setattr(model, FLAG, False)
        try:
            check(self, *args, **kwargs)
        finally:
            setattr(model, FLAG, True)

    return post_init


def _connectors(transfer: Any) -> frozenset[str]:
    """Names of one or several."""
    name = getattr(transfer, "kv_connector", None)
    if name != "MultiConnector":
        return frozenset({name} if name else ())
    return frozenset(one["kv_connector"] for one in transfer.kv_connector_extra_config["connectors"])
