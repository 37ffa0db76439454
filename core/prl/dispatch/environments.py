"""Where tasks become rollouts: environment workers behind the hub, and cheap environments inside the controller.

Both kinds answer the same two calls; who calls (`placement`, `warmup`) cannot tell them apart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import attrs

from prl.compose.routing import Routing
from prl.dispatch.change import Change
from prl.dispatch.hub import DisconnectedError, Hub
from prl.dispatch.verify import verify_group, verify_samples
from prl.errors import InfrastructureError
from prl.messages import Demonstrate, Demonstrations, GroupDone, InFlightKept, KeepInFlight, RunGroup
from prl.types import Carried, Group, Sample, TaskRef

log = logging.getLogger(__name__)

_KEEP_SECONDS = 60.0


class Runner(Protocol):
    """What `prl.rollout.runner.GroupRunner` offers to run environments in this process."""

    async def run(self, request: RunGroup) -> Group: ...

    async def demonstrate(self, tasks: Sequence[TaskRef]) -> tuple[Sample, ...]: ...

    async def keep_in_flight(self, path: Path, version: int) -> tuple[Carried, ...]: ...


@attrs.frozen(eq=False)
class RemoteRunner:
    """An environment worker, through the hub. Cancelling a call tells the worker to stop working on it.

    An answer that makes no sense is an InfrastructureError, as one that does not come.
    """

    hub: Hub
    peer: bytes
    newest: Callable[[], int]
    """Newest policy version there is."""
    routing: Routing | None = None
    """Of the model whose routes are replayed."""

    async def run(self, request: RunGroup) -> Group:
        answer: GroupDone = await self.hub.request(self.peer, request)
        verify_group(answer.group, request, self.newest(), self.routing)
        return answer.group

    async def demonstrate(self, tasks: Sequence[TaskRef]) -> tuple[Sample, ...]:
        answer: Demonstrations = await self.hub.request(self.peer, Demonstrate(request=0, tasks=tuple(tasks)))
        verify_samples(answer.samples)
        return answer.samples

    async def keep_in_flight(self, path: Path, version: int) -> tuple[Carried, ...]:
        order = KeepInFlight(request=0, path=str(path), version=version)
        answer: InFlightKept = await self.hub.request(self.peer, order)
        return answer.groups


@attrs.define(kw_only=True, eq=False)
class Place:
    """A runner and the environments it has."""

    name: str
    runner: Runner
    environments: frozenset[str]
    busy: int = 0
    """Calls that have not returned."""


class EnvironmentPool:
    """Every place where tasks can run. One whose connection is gone is left out until its successor joins."""

    def __init__(self, places: Iterable[Place], *, on_run: Callable[[RunGroup, str], None]) -> None:
        self._places = {place.name: place for place in places}
        self._change = Change()
        self._on_run = on_run
        """Told of every group that is sent somewhere, with the name of the place."""

    async def run(self, request: RunGroup) -> Group:
        """Have a group rolled out where least is going on; InfrastructureError when that place cannot.

        Waits while nobody has the environment: whoever supervises the run starts a successor, or ends the run.
        """
        async with self._least_busy(request.task.environment) as place:
            self._on_run(request, place.name)
            return await place.runner.run(request)

    async def demonstrate(self, tasks: Sequence[TaskRef]) -> list[Sample]:
        """Demonstrations of tasks of any environments, divided between the places that have them."""
        async with asyncio.TaskGroup() as calls:
            parts = [calls.create_task(self._demonstrate(part)) for part in self._divide(tasks)]
        return [sample for part in parts for sample in part.result()]

    async def keep_in_flight(self, folder: Path, version: int) -> list[Carried]:
        """Have every place write what is finished of its groups into a file of `folder`.

        A place that cannot, or not in time, keeps nothing: its groups are sampled again if it comes to that.
        """
        places = list(self._places.values())
        kept = await asyncio.gather(*(self._keep(place, folder / place.name, version) for place in places))
        return [entry for part in kept for entry in part]

    async def _keep(self, place: Place, path: Path, version: int) -> list[Carried]:
        try:
            async with asyncio.timeout(_KEEP_SECONDS):
                entries = await place.runner.keep_in_flight(path, version)
        except (InfrastructureError, OSError) as error:  # a TimeoutError is an OSError
            log.warning("the checkpoint keeps nothing of what %s has in flight: %s", place.name, error or "no answer")
            return []
        return [attrs.evolve(entry, file=str(path)) for entry in entries]

    def join(self, place: Place) -> None:
        """A place is there, in place of an earlier one of its name."""
        self._places[place.name] = place
        self._change.notify()

    def lose(self, name: str) -> None:
        """A place is gone."""
        self._places.pop(name, None)

    def _divide(self, tasks: Sequence[TaskRef]) -> list[list[TaskRef]]:
        parts = []
        for name in sorted({task.environment for task in tasks}):
            chosen = [task for task in tasks if task.environment == name]
            places = max(1, len(self._having(name)))
            parts += [chosen[start::places] for start in range(min(places, len(chosen)))]
        return parts

    async def _demonstrate(self, tasks: Sequence[TaskRef]) -> tuple[Sample, ...]:
        async with self._least_busy(tasks[0].environment) as place:
            return await place.runner.demonstrate(tasks)

    def _having(self, environment: str) -> list[Place]:
        return [place for place in self._places.values() if environment in place.environments]

    @asynccontextmanager
    async def _least_busy(self, environment: str) -> AsyncIterator[Place]:
        await self._change.until(lambda: bool(self._having(environment)))
        place = min(self._having(environment), key=lambda place: place.busy)
        place.busy += 1
        try:
            yield place
        except DisconnectedError:
            if self._places.get(place.name) is place:
                self.lose(place.name)
            raise
        finally:
            place.busy -= 1
