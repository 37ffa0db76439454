"""Processes that die while the run goes on: what the controller is told of them, and how their successors come back.

    failures.jsonl ──► read ──► requests to it fail, its groups are cut, the ledger has the reason
    Hello of its successor ──► an engine is caught up by publication, an environment worker gets work again

Whoever supervises the run starts the successor (`prl.supervise`). Knows nothing of processes or signals.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Literal, cast

import attrs

from prl.dispatch.engines import EnginePool
from prl.dispatch.environments import EnvironmentPool, Place
from prl.dispatch.hub import Hub
from prl.errors import RunError
from prl.ledger import facts
from prl.ledger.writer import Ledger
from prl.messages import Hello
from prl.providers import EngineClient
from prl.run_dir import RunDir
from prl.supervise.casualties import Casualty, Reader

POLL_SECONDS = 0.25


class Casualties:
    """Takes leave of the dead and welcomes their successors. `run` is a loop of the controller."""

    def __init__(self, run_dir: RunDir, hub: Hub, ledger: Ledger) -> None:
        self._reader = Reader(run_dir)
        self._lock = threading.Lock()
        self._news: deque[Casualty] = deque()
        self._attempt = max(run_dir.attempts(), default=1)
        self._hub = hub
        self._ledger = ledger
        self.survivors: Survivors | None = None
        """None until the run's parts are built around the first to come."""

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(POLL_SECONDS)

    async def look(self) -> None:
        """Take note of what was written since the last look."""
        await asyncio.to_thread(self._read)
        while self._news:
            casualty = self._news.popleft()
            if casualty.attempt == self._attempt:
                self._take_leave(casualty)

    def _read(self) -> None:
        """In a thread. One whose waiting task was cancelled goes on, and leaves its news to the next."""
        with self._lock:
            self._news.extend(self._reader.read())

    def _take_leave(self, casualty: Casualty) -> None:
        sentence, done = casualty.sentence, casualty.done
        self._ledger.record(facts.Failed(who=casualty.name, where="process", sentence=sentence, done=done))
        if casualty.role not in ("engine", "environment"):
            return
        role = cast(Literal["engine", "environment"], casualty.role)
        if self._hub.lose(role, casualty.index, casualty.pid, sentence) and self.survivors is not None:
            self.survivors.lose(role, casualty.index, sentence)


@attrs.frozen(kw_only=True, eq=False)
class Survivors:
    """The parts of the controller that must know who is there."""

    engines: EnginePool
    environments: EnvironmentPool
    connect: Callable[[str], EngineClient]
    """A client of the engine at a URL."""
    place: Callable[[bytes, Hello], Place]
    """Where tasks run: the environment worker behind a connection."""
    sizes: dict[str, int]
    """`{"<environment>/<split>": tasks}` as the run knows them."""

    def lose(self, role: Literal["engine", "environment"], index: int, sentence: str) -> None:
        if role == "engine":
            self.engines.lose(index, sentence)
        else:
            self.environments.lose(f"environment-{index}")

    def welcome(self, peer: bytes, hello: Hello) -> None:
        """A successor; RunError when it has other tasks than the run was begun with."""
        if hello.role == "engine-part":
            return  # it is its engine's to notice
        if hello.role == "engine":
            self.engines.replace(hello.index, hello.url, self.connect(hello.url))
            return
        differing = {name: size for name, size in hello.sizes.items() if self.sizes.get(name) != size}
        if differing:
            name = peer.decode()
            raise RunError(f"{name} came back with other tasks ({differing}); environments must be the same everywhere")
        self.environments.join(self.place(peer, hello))
