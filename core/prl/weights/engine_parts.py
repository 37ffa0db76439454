"""The process of an engine on a node that is not its first: hands the provider's `join` what it needs.

    engine-0 (first node) ◄── how they meet is the engine's ──► engine-part-0, engine-part-1, ... (its other nodes)

Nobody but its engine talks to it; the controller only tells it when to go. Started by `prl worker --role engine-part`.
"""

from __future__ import annotations

import asyncio

from prl.compose.compose import Composition
from prl.compose.plan import parts_of
from prl.run_dir import RunDir
from prl.weights.engines import Duty, work


def main(composition: Composition, run_dir: RunDir, index: int) -> int:
    """Be part of an engine until `Stop`; the exit code of the process."""
    part = parts_of(composition.run.engine)[index]
    asyncio.run(work(composition, run_dir, Duty(role="engine-part", number=index, engine=part.engine, node=part.node)))
    return 0
