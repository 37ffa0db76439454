"""One attempt at one group: on which engine, by which environment runner, for how long, and whether enough came of it.

Used by the dispatcher (training) and by evaluation. Knows nothing of staleness, retries or batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from prl.dispatch.engines import Attempt, Engine, EnginePool
from prl.dispatch.environments import EnvironmentPool
from prl.dispatch.feed import Issue
from prl.dispatch.hub import DisconnectedError
from prl.errors import InfrastructureError
from prl.messages import RunGroup
from prl.types import Carried, Group, Sampling


class GroupLostError(InfrastructureError):
    """An attempt came to nothing; `reason` is the word for it in metrics: `timeout`, `engine`, `stale`, ...

    `cut`: it was ended from here, and says nothing about whether the task can be rolled out.
    """

    def __init__(self, reason: str, sentence: str, *, cut: bool = False) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.cut = cut


class Placement:
    """Runs groups on the least loaded engine, through the least busy environment runner."""

    def __init__(self, engines: EnginePool, environments: EnvironmentPool, *, timeout: float) -> None:
        self._engines = engines
        self._environments = environments
        self._timeout = timeout
        self._attempts: dict[int, Attempt] = {}

    async def run(
        self, issue: Issue, *, size: int, sampling: Sampling, version: int, carried: Carried | None = None
    ) -> Group:
        """Roll out `size` siblings of a task; `version` is the newest one served, `carried` what there is already.

        A group from which some rollouts are missing is kept when at least two remain (one, where only one was asked
        for): their advantages are still relative to each other. Otherwise, and when the attempt takes longer than
        the timeout or is cut, raises GroupLostError.
        """
        attempt = Attempt(size=size, deadline=asyncio.timeout(self._timeout))
        self._attempts[issue.group_id] = attempt
        try:
            async with attempt.deadline:
                engine = await self._engines.choose()
                with _loaded(engine, attempt):
                    request = _request(issue, attempt, engine, sampling, version, carried)
                    group = await self._environments.run(request)
        except TimeoutError as error:
            reason = attempt.cut_reason or "timeout"
            sentence = f"group {issue.group_id} was cut ({reason})"
            raise GroupLostError(reason, sentence, cut=bool(attempt.cut_reason)) from error
        except DisconnectedError as error:
            raise GroupLostError("environment", f"group {issue.group_id}: {error}", cut=True) from error
        except InfrastructureError as error:
            raise GroupLostError("environment", f"group {issue.group_id}: {error}") from error
        finally:
            del self._attempts[issue.group_id]
        return self._worth_keeping(group, engine, size)

    def cut(self, group_id: int, reason: str) -> None:
        """End an attempt; its group is lost for `reason`. Attempts that have ended are left alone."""
        attempt = self._attempts.get(group_id)
        if attempt is not None:
            attempt.cut(reason)

    def _worth_keeping(self, group: Group, engine: Engine, size: int) -> Group:
        if any(failure.where == "engine" for failure in group.failures):
            self._engines.poll()  # finds out whether the engine is well
        if len(group.rollouts) >= min(2, size):
            return group
        first = next(iter(group.failures), None)
        where, error = (first.where, first.error) if first else ("environment", "it came back without rollouts")
        raise GroupLostError(where, f"group {group.group_id} on engine {engine.index}: {error}")


@contextmanager
def _loaded(engine: Engine, attempt: Attempt) -> Iterator[None]:
    engine.attempts.add(attempt)
    try:
        yield
    finally:
        engine.attempts.remove(attempt)


def _request(
    issue: Issue, attempt: Attempt, engine: Engine, sampling: Sampling, version: int, carried: Carried | None
) -> RunGroup:
    return RunGroup(
        request=0,
        group_id=issue.group_id,
        task=issue.task,
        attempt=issue.attempt,
        size=attempt.size,
        sampling=sampling,
        engine=engine.url,
        version=version,
        carried=carried,
    )
