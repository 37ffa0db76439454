"""The embedded engine: the trainer's own torch modules behind an HTTP server.

Chosen by `[engine] type = "torch"`. Its process runs `server:serve`; environment workers and the controller talk to it
through `prl.serve.client`. This module only describes the engine and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs
from attrs import validators
from prl import hookimpl, option
from prl.compose.config import EngineConfig, Run
from prl.providers import Engine


@attrs.frozen(kw_only=True)
class TorchEngineConfig(EngineConfig):
    """`[engine]` with `type = "torch"`."""

    sequences: int = option(64, help="sequences that decode at once", validator=validators.gt(0))
    length: int = option(0, help="most tokens of a sequence; 0: rollouts.sequence_length", validator=validators.ge(0))
    threads: int = option(1, help="CPU threads of the model", validator=validators.gt(0))
    prefill_tokens: int = option(
        1024, help="most prompt tokens computed between two decoding steps", validator=validators.gt(0)
    )
    batch_invariant: Literal["auto", "on", "off"] = option(
        "auto",
        help="tokens do not depend on what else is computed at the same time, to the last bit (dense models in float32 "
        "on a CPU); auto: at staleness 0",
    )
    retained: int = option(
        32, help="cache rows for prompts being computed and prefixes kept for later turns", validator=validators.gt(0)
    )


@hookimpl
def prl_engines() -> Iterable[Engine]:
    return [
        Engine(
            name="torch",
            config=TorchEngineConfig,
            summary="the trainer's own modules: continuous batching, prefix reuse, in-flight weight updates",
            serve="prl_torch_engine.server:serve",
            connect="prl.serve.client:connect",
            reports_routes=True,
            resumable=True,
        )
    ]


@hookimpl
def prl_validate(run: Run) -> Iterable[str]:
    """A rollout must fit into a cache row."""
    engine = run.engine
    if isinstance(engine, TorchEngineConfig) and 0 < engine.length < run.rollouts.sequence_length:
        yield (
            f"engine.length = {engine.length} is shorter than rollouts.sequence_length = "
            f"{run.rollouts.sequence_length}; raise it, or leave it out"
        )
