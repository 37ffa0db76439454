"""The engine process: builds the model, starts its thread, serves HTTP.

    main thread    event loop: HTTP, control                    (this module, engine.py and the endpoints)
    model's thread continuous batching                          (generation.py, scheduler.py, batch.py)
    worker thread  fetches and verifies the next weights        (weights.py)

Every endpoint but /health wants the run's token. Called by `prl.weights.engines`.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import msgpack
import torch
from aiohttp import web
from prl_torch_engine import TorchEngineConfig, body
from prl_torch_engine.chat import ChatEndpoint
from prl_torch_engine.engine import Engine
from prl_torch_engine.generate import GenerateEndpoint
from prl_torch_engine.generation import Generation
from prl_torch_engine.metrics import exposition
from prl_torch_engine.refusal import Refusal
from prl_torch_engine.scheduler import Scheduler
from prl_torch_engine.weights import Weights

from prl import wire
from prl.types import Manifest

if TYPE_CHECKING:
    from prl.weights.engines import EngineContext

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 64 << 20


async def serve(context: EngineContext) -> None:
    """Announce the engine once it listens, and serve until cancelled or until the model fails."""
    torch.set_num_threads(_config(context).threads)
    model, weights, chat_parts = await asyncio.to_thread(_build, context)
    config = _config(context)
    scheduler = Scheduler(
        model,
        sequences=config.sequences,
        retained=config.retained,
        length=config.length or context.composition.run.rollouts.sequence_length,
        prefill_tokens=config.prefill_tokens,
    )
    generation = Generation(scheduler)
    engine = Engine(scheduler, generation, weights, vocab_size=chat_parts[0].vocab_size)
