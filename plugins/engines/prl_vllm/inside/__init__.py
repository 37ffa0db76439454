"""What of prl runs inside vLLM's processes: brought in through vLLM's own plugin entry points, nothing is patched over.

`register` is the entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes. It does
nothing unless the environment says that the server belongs to a run.
"""

from __future__ import annotations

import os

SWITCH = "PRL_VLLM"
"""Environment variable: `1` in every process of a server that serves a run."""
ROUTES = "PRL_VLLM_ROUTES"
"""Environment variable: `1` where the run replays routes."""
HANDOVER = "PRL_VLLM_HANDOVER"
"""Environment variable: `1` where engines hand prompts to each other."""
TIERS = "PRL_VLLM_TIERS"
"""Environment variable: `1` where keys and values go to tiers behind the cache."""
ROUTE_BYTES = "prl_route_bytes"
"""Entry in the configuration of KV tiers: bytes of one token's routes, which are kept with its keys and values."""
KEY_VARIABLE = "PRL_VLLM_API_KEY"
"""Environment variable: the key of servers that are joined."""
PROTOCOL = 2
"""Raised when the methods of `worker.Extension` change their meaning, so that a server of another prl is told apart."""


def register() -> None:
    """Called by vLLM, in every process, perhaps more than once."""
    if os.environ.get(SWITCH) != "1":
        return
    from vllm.platforms import current_platform

    from prl_vllm.inside import lifetime, unfinished

    lifetime.end_with_parent()
    unfinished.install()
    if os.environ.get(HANDOVER) == "1":
        from prl_vllm.inside import kept

        kept.install()
    if current_platform.is_cpu():
        from prl_vllm.inside import mends

        mends.apply()
        if os.environ.get(ROUTES) == "1":
            from prl_vllm.inside import routes

            routes.install()
    elif os.environ.get(ROUTES) == "1":
        from prl_vllm.inside import handed_routes

        handed_routes.install()
        if os.environ.get(TIERS) == "1":
            from prl_vllm.inside import carried_routes

            carried_routes.install()
