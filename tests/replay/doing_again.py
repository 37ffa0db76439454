"""A fake run replayed by the real re-enactment, with ranks that speak real messages; logs with something changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from prl.ledger import event_log
from prl.ledger.events import Event
from prl.replay import worker
from prl.replay.history import Segment, segments
from prl.replay.order import Order, Report

from tests.dispatch.fakes import FakeComposition, FakeRun, FakeTrainer


@attrs.define(eq=False)
class FakeReplay(FakeRun):
    """The process in charge of a replay, and ranks; no engine and no environment."""

    order: Any = None
    report: Any = None

    async def _go(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        composition: Any = FakeComposition(self.run, self.hooks, self.engines, self.tracker)
        self.report = await worker.act(composition, self.run_dir, self.order)


def replay(run: FakeRun, *, until: int | None = None, rank: Callable[[int], FakeTrainer] | None = None) -> list[Report]:
    """One report for each launch that counts; `rank` makes a trainer rank that holds the version it is given."""
    return [
        _replay(run, segment, rank or (lambda version: FakeTrainer(version=version)))
        for segment in segments(run.run_dir, until)
    ]


def _replay(run: FakeRun, segment: Segment, rank: Callable[[int], FakeTrainer]) -> Report:
    scratch = run.path / "replay" / str(segment.launch)
    order = Order(
        run=str(run.path),
        launch=segment.launch,
        log=str(segment.log),
        end=segment.end,
        followed_by=str(segment.followed_by or ""),
        checkpoint=str(scratch / "checkpoints" / f"step-{segment.end}") if segment.followed_by else "",
        tell=False,
    )
    again = FakeReplay(
        scratch,
        run.run,
        environments=[],
        engines=[],
        trainers=[rank(segment.start) for _ in run.trainers],
        order=order,
    )
    again.go()
    report: Report = again.report
    return report


def events(run: FakeRun, launch: int = 1) -> list[Event]:
    return [event for _, event in event_log.read(event_log.path_of(run.run_dir, launch))]


def change(run: FakeRun, changed: Callable[[Event], Event | None], launch: int = 1) -> Event:
    """Rewrite the first event for which `changed` has another, with a checksum that fits; what it was."""
    path = event_log.path_of(run.run_dir, launch)
    entries = list(event_log.read(path))
    for number, (at, event) in enumerate(entries):
        other = changed(event)
        if other is not None:
            entries[number] = (at, other)
            write(path, entries)
            return event
    raise AssertionError("no event was changed")


def write(path: Path, entries: list[tuple[float, Event]]) -> None:
    path.write_bytes(event_log.MAGIC + b"".join(event_log.record(at, event) for at, event in entries))
