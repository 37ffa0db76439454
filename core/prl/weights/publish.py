"""A trained version reaches the engines: prepare while they serve, commit, acknowledge, retire.

    announce(manifest) ──► one keeper per engine: prepare ─► commit ─► acknowledged ──► on_served, retire what is older

A keeper waits for a manifest newer than what its engine holds (or for its engine's eviction) and brings the engine to
the newest one, skipping what was overtaken. An engine that fails or misses a deadline is evicted and caught up in the
same way, with pauses that grow; it serves again once it holds a version at least as new as the one served. Runs in the
controller and never waits for the trainer. Knows nothing of tensors: the bytes travel from trainer to engine through
the weight transport.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from prl.dispatch.change import Change
from prl.dispatch.engines import Engine, EnginePool
from prl.errors import InfrastructureError, RunError
from prl.types import Manifest

log = logging.getLogger(__name__)

_CATCH_UPS = 3  # per engine, before a run without engines fails
_LONGEST_PAUSE = 32  # in units of `pause`


class Publisher:
    """Brings every engine to the newest version, and knows which one all of them serve.

    `patience(nbytes)` is how many seconds prepare or commit of so many bytes may take.
    `on_served(version, seconds)` is called when the last serving engine has acknowledged, `seconds` after the version
    was announced; `retire(version)` for every version that no serving engine will ask for any more;
    `condemn(index, reason)` for an engine that answers and takes no weights: its process is to be restarted.
    """

    def __init__(
        self,
        engines: EnginePool,
        *,
        change: Change,
        patience: Callable[[int], float],
        on_served: Callable[[int, float], None],
        retire: Callable[[int], Awaitable[None]],
        condemn: Callable[[int, str], None],
        pause: float = 1.0,
    ) -> None:
        self._engines = engines
        self._change = change
        self._patience = patience
        self._on_served = on_served
        self._retire = retire
        self._condemn = condemn
        self._pause = pause
        self._newest: Manifest | None = None
        self._announced: dict[int, float] = {}
        """Versions not yet retired -> when they were announced."""
        self.served = -1

    def announce(self, manifest: Manifest) -> None:
        """A new version can be fetched."""
        self._newest = manifest
        self._announced[manifest.version] = time.monotonic()
        self._change.notify()

    async def first(self, manifest: Manifest) -> None:
        """Bring every engine to the version the run starts from; RunError when one of them cannot.

        An engine whose process dies meanwhile is waited for.
        """
        self.announce(manifest)
        async with asyncio.TaskGroup() as updates:
            for engine in self._engines.engines:
                updates.create_task(self._first(engine, manifest))
        await self._acknowledge()

    async def _first(self, engine: Engine, manifest: Manifest) -> None:
        while not engine.serving:
            client = engine.client
            try:
                await self._update(engine, manifest)
            except InfrastructureError as error:
                await asyncio.sleep(self._pause)  # by then it is known if its process is gone
                if engine.client is client and not engine.absent:
                    what = f"engine {engine.index} ({engine.url}) cannot load the first weights"
                    raise RunError(f"{what}: {error}") from error
                await self._change.until(lambda: not engine.absent)
            else:
                self._engines.rejoin(engine)

    # --- keepers ------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled; RunError when no engine is left and none can be caught up."""
        async with asyncio.TaskGroup() as keepers:
            for engine in self._engines.engines:
                keepers.create_task(self._keep(engine))

    async def _keep(self, engine: Engine) -> None:
        while True:
            manifest = await self._wanted(engine)
            try:
                await self._update(engine, manifest)
            except InfrastructureError as error:
                await self._failed(engine, error)
            else:
                await self._succeeded(engine)

    async def _wanted(self, engine: Engine) -> Manifest:
        """The newest manifest, once the engine needs it."""

        def behind() -> bool:
            newest = self._newest
            return (
                newest is not None and not engine.absent and not (engine.serving and engine.version >= newest.version)
            )

        await self._change.until(behind)
        assert self._newest is not None, "behind() has seen it"
        return self._newest

    async def _update(self, engine: Engine, manifest: Manifest) -> None:
        seconds = self._patience(manifest.nbytes)
        client = engine.client
        await _within(seconds, client.prepare(manifest), f"prepare of version {manifest.version}")
        await _within(seconds, client.commit(manifest.version), f"commit of version {manifest.version}")
        if engine.client is not client:
            raise InfrastructureError(f"engine {engine.index} was started again during the update")
        self._engines.committed(engine, manifest.version)

    async def _succeeded(self, engine: Engine) -> None:
        engine.failures = 0
        if engine.version >= self.served:
            self._engines.rejoin(engine)
        await self._acknowledge()

    async def _failed(self, engine: Engine, error: InfrastructureError) -> None:
        self._engines.failed(engine, error)
        if engine.failures > _CATCH_UPS:
            self._lost(engine, error)
        await self._acknowledge()
        await asyncio.sleep(self._pause * min(2 ** (engine.failures - 1), _LONGEST_PAUSE))

    def _lost(self, engine: Engine, error: InfrastructureError) -> None:
        """More of the same will not help it: its process is restarted, or, where no engine is left, the whole run."""
        sentence = (
            f"engine {engine.index} ({engine.url}) failed {engine.failures} updates in a row, the last one because"
        )
        if all(not other.serving and other.failures > _CATCH_UPS for other in self._engines.engines):
            raise InfrastructureError(f"no engine is left: {sentence}: {error}")
        if engine.failures == _CATCH_UPS + 1:
            self._condemn(engine.index, f"{sentence}: {error}")

    async def _acknowledge(self) -> None:
        """Take note of what all serving engines hold by now."""
        versions = [engine.version for engine in self._engines.serving]
        if not versions or min(versions) <= self.served:
            return
        self.served = min(versions)
        self._on_served(self.served, time.monotonic() - self._announced[self.served])
        self._change.notify()
        old = [version for version in self._announced if version < self.served]
        for version in old:
            del self._announced[version]
        for version in old:
            await self._retire(version)


async def _within(seconds: float, call: Awaitable[None], what: str) -> None:
    try:
        async with asyncio.timeout(seconds):
            await call
    except TimeoutError as error:
        raise InfrastructureError(f"{what} took longer than {seconds:.0f} s") from error
