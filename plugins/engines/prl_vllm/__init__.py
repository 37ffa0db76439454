"""vLLM as the engine: the real server, unpatched, with the run's weights brought in while it serves.

    engine process    the run's HTTP API and its rules about versions     server.py, engine.py
    vllm's processes  started here or joined; prl's part in them           inside/

Chosen by `[engine] type = "vllm"`. This module only describes the engine and imports neither torch nor vllm; which
releases of vLLM it knows is in `release.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prl import hookimpl
from prl.compose.config import Run
from prl.providers import Engine, Limit

from prl_vllm.config import VllmConfig
from prl_vllm.rules import problems


@hookimpl
def prl_engines() -> Iterable[Engine]:
    yield Engine(
        name="vllm",
        config=VllmConfig,
        summary="vLLM's own server: paged attention, every model and device it knows, in-flight weight updates",
        requires=("vllm",),
        serve="prl_vllm.server:serve",
        join="prl_vllm.spanning:join",
        connect="prl.serve.client:connect",
        reports_routes=True,
    )


@hookimpl
def prl_validate(run: Run, limits: Sequence[Limit]) -> Iterable[str]:
    """What does not fit together, and names that the installed vLLM does not know."""
    if isinstance(run.engine, VllmConfig):
        yield from problems(run.engine, run, limits)
