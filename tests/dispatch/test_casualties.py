"""Processes that die under a running controller, and their successors: work is tried again, nothing is lost."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress

import attrs
from prl.messages import TO_WORKER, Hello, RunGroup, Stop
from prl.supervise import casualties
from prl.supervise.casualties import Casualty
from prl.wire import Connection

from tests.dispatch.fakes import FakeEngine, FakeEnvironment, FakeRun, answer, toy_run

TOLD_PID = 1
"""What the workers of a FakeRun say in their Hello."""


def report(run: FakeRun, role: str, index: int, *, attempt: int = 1, pid: int = TOLD_PID) -> None:
    """What a supervisor writes when a process dies."""
    casualty = Casualty(
        attempt=attempt,
        role=role,
        index=index,
        pid=pid,
        sentence=f"{role}-{index} was ended by SIGKILL",
        done="started again",
        at=time.time(),
    )
    casualties.append(run.run_dir, casualty)


class DeathError(Exception):
    """The process behind a fake worker is gone."""


@attrs.define(eq=False)
class Mortal(FakeEnvironment):
    """Its first life ends, silently, with the first group it is sent; its second one answers."""

    die: Callable[[], None] | None = None
    lives: int = 0

    def serve(self, connection: Connection, index: int) -> None:
        self.lives += 1
        self.pid = self.lives
        with suppress(DeathError):
            super().serve(connection, index)

    def _run(self, connection: Connection, request: RunGroup) -> None:
        if self.lives == 1:
            self.asked.append(request)
            self.die()
            raise DeathError
        super()._run(connection, request)


@attrs.define(eq=False)
class Second(FakeEngine):
    """A successor that says when it holds weights."""

    ready: threading.Event = attrs.field(factory=threading.Event)

    async def commit(self, version: int) -> None:
        await super().commit(version)
        self.ready.set()


@attrs.define(eq=False)
class TwoEngines(FakeRun):
    """The process of engine 1 ends when told; what lies behind `engine-2` takes its place."""

    dead: threading.Event = attrs.field(factory=threading.Event)

    def _engine(self, connection: Connection, index: int) -> None:
        if index == 0:
            super()._engine(connection, index)
        if index == 1:
            connection.send(Hello(role="engine", index=1, pid=TOLD_PID, host="here", url="engine-1"))
            assert self.dead.wait(20)

    def succeed(self, connection: Connection, index: int) -> None:
        connection.send(Hello(role="engine", index=index, pid=TOLD_PID + 1, host="here", url="engine-2"))
        assert isinstance(connection.receive(TO_WORKER), Stop)


def beside(run: FakeRun, role: str, index: int, serve: Callable[[Connection, int], None]) -> None:
    threading.Thread(target=run._work, args=(role, index, serve), daemon=True).start()


def failures(run: FakeRun) -> list[tuple[str, str, str]]:
    with closing(sqlite3.connect(run.run_dir.ledger)) as ledger:
        return ledger.execute("SELECT who, sentence, done FROM failures WHERE place = 'process'").fetchall()


def test_what_a_dead_environment_worker_was_asked_for_is_tried_again(tmp_path):
    """There is no other: its groups wait until the successor is there."""
    environment = Mortal()
    run = FakeRun(tmp_path, toy_run(steps=3), environments=[environment])

    def die() -> None:
        report(run, "environment", 0)
        beside(run, "environment", 0, environment.serve)

    environment.die = die
    run.go()
    assert environment.lives == 2
    assert sorted(run.trained_groups()) == list(range(6))
    assert failures(run) == [("environment-0", "environment-0 was ended by SIGKILL", "started again")]


def test_an_engine_that_dies_is_left_out_until_its_successor_is_caught_up(tmp_path):
    """What runs on it is cut and tried elsewhere; those attempts are answered when the successor holds weights."""
    second = Second()
    held: list[int] = []

    def reply(request: RunGroup):
        if request.engine == "engine-1":
            if not held:
                report(run, "engine", 1)
                run.dead.set()
                beside(run, "engine", 1, run.succeed)
            held.append(request.group_id)
            return None  # nobody answers any more
        if request.attempt == 1:
            assert second.ready.wait(20)
        return answer(request)

    run = TwoEngines(
        tmp_path,
        toy_run(steps=8, max_staleness=2, engines=2),
        environments=[FakeEnvironment(reply=reply)],
        engines=[FakeEngine(), FakeEngine(), second],
    )
    run.go()
    assert sorted(run.trained_groups()) == list(range(16))
    again = {request.group_id for request in run.environments[0].asked if request.attempt == 1}
    assert held
    assert set(held) <= again
    assert second.committed[0] >= 0
    assert run.state["engines"] == []
    assert failures(run) == [("engine-1", "engine-1 was ended by SIGKILL", "started again")]


def test_a_line_about_another_attempt_or_an_earlier_life_changes_nothing(tmp_path):
    environment = FakeEnvironment()
    run = FakeRun(tmp_path, toy_run(steps=2), environments=[environment])
    report(run, "environment", 0, attempt=7)
    report(run, "environment", 0, pid=TOLD_PID + 1)
    run.go()
    assert {request.attempt for request in environment.asked} == {0}
    assert sorted(run.trained_groups()) == [0, 1, 2, 3]
