"""Where tasks become rollouts: environment workers behind the hub, or cheap environments inside the controller.

Both kinds answer the same two calls; who calls (`placement`, `warmup`) cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import attrs

from prl.dispatch.hub import DisconnectedError, Hub
from prl.errors import RunError
from prl.messages import Demonstrate, RunGroup
from prl.types import Group, Sample, TaskRef


class Runner(Protocol):
    """What `prl.rollout.worker.GroupRunner` offers to run environments in this process."""

    async def run(self, request: RunGroup, /) -> Group: ...

    async def demonstrate(self, tasks: tuple[TaskRef, ...], /) -> tuple[Sample, ...]: ...


@attrs.frozen(eq=False)
class RemoteRunner:
    """An environment worker, through the hub. Cancelling a call tells the worker to stop working on it."""

    hub: Hub
    peer: bytes

    async def run(self, request: RunGroup, /) -> Group:
        group: Group = (await self.hub.request(self.peer, request)).group
        return group

    async def demonstrate(self, tasks: tuple[TaskRef, ...], /) -> tuple[Sample, ...]:
        answer = await self.hub.request(self.peer, Demonstrate(request=0, tasks=tasks))
        samples: tuple[Sample, ...] = answer.samples
        return samples


@attrs.define(eq=False)
class _Place:
    runner: Runner
    busy: int = 0
    """Calls that have not returned."""


class EnvironmentPool:
    """Every runner of the run. One whose connection is gone is left out from then on."""

    def __init__(self, runners: Sequence[Runner]) -> None:
        self._places = [_Place(runner) for runner in runners]

    async def run(self, request: RunGroup) -> Group:
        """Have a group rolled out by the least busy runner; InfrastructureError when it cannot."""
        async with self._least_busy() as runner:
            return await runner.run(request)

    async def demonstrate(self, tasks: tuple[TaskRef, ...]) -> tuple[Sample, ...]:
        """Samples of the ce stream; tasks without a demonstration give none."""
        async with self._least_busy() as runner:
            return await runner.demonstrate(tasks)

    def __len__(self) -> int:
        return len(self._places)

    @asynccontextmanager
    async def _least_busy(self) -> AsyncIterator[Runner]:
        if not self._places:
            raise RunError("every environment worker has lost its connection; `prl logs` shows why")
        place = min(self._places, key=lambda place: place.busy)
        place.busy += 1
        try:
            yield place.runner
        except DisconnectedError:
            if place in self._places:
                self._places.remove(place)
            raise
        finally:
            place.busy -= 1
