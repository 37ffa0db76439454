"""prl: asynchronous reinforcement learning for language models, assembled from plugins.

A plugin imports from here and from `prl.compose.config` (the bases of config sections); nothing in this module imports
torch.
"""

from __future__ import annotations

import pluggy

from prl.providers import option

__version__ = "0.1.0"
hookimpl = pluggy.HookimplMarker("prl")

__all__ = ["__version__", "hookimpl", "option"]
