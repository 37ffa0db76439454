"""The engine process: builds the model, starts its thread, serves HTTP.

    main thread      event loop: HTTP and control            (this module, engine.py, prl.serve)
    model's thread   continuous batching                     (generation.py, scheduler.py, batch.py)
    worker threads   fetch and verify the next weights       (weights.py)

The endpoints are those of every engine (`prl.serve`). Called by `prl.weights.engines`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import torch
from prl.compose.routing import replayed
from prl.freed_memory import keep_freed
from prl.serve.application import application, listening

from prl_torch_engine import TorchEngineConfig
from prl_torch_engine.engine import Engine
from prl_torch_engine.generation import Generation
from prl_torch_engine.loading import load
from prl_torch_engine.scheduler import Scheduler
from prl_torch_engine.weights import Weights

if TYPE_CHECKING:
    from prl.compose.config import Run
    from prl.weights.engines import EngineContext


async def serve(context: EngineContext) -> None:
    """Announce the engine once it listens, and serve until cancelled or until the model fails."""
    run = context.composition.run
    config = cast(TorchEngineConfig, run.engine)
    keep_freed()
    torch.set_num_threads(config.threads)
    loaded = await asyncio.to_thread(load, context.composition)
    scheduler = Scheduler(
        loaded.model,
        sequences=config.sequences,
        retained=config.retained,
        length=config.length or run.rollouts.sequence_length,
        prefill_tokens=config.prefill_tokens,
        batch_invariant=batch_invariant(config, run),
        routing=replayed(context.composition),
    )
    weights = Weights(loaded.module, loaded.weight_map, context.receiver, number_format=loaded.number_format)
    generation = Generation(scheduler)
    engine = Engine(scheduler, generation, weights, vocab_size=len(loaded.model.head()))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(generation.run))
        try:
            async with listening(application(engine, loaded.speech, context.token), context.host) as url:
                await context.announce(url)
                await asyncio.Event().wait()
        finally:
            generation.stop()


def batch_invariant(config: TorchEngineConfig, run: Run) -> bool:
    """A scheduler without a field for the bound may leave the bound open."""
    if config.batch_invariant == "auto":
        return getattr(run.scheduler, "max_staleness", None) == 0
    return config.batch_invariant == "on"
