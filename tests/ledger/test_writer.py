"""The controller's hand in the ledger: order, waiting, ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prl.errors import RunError
from prl.ledger import facts, store, writer
from prl.ledger.read import snapshot
from prl.ledger.writer import Ledger

from tests.ledger.histories import eventful


def failure(number: int) -> facts.Failed:
    return facts.Failed(who=f"{number}", where="here", sentence="broke", done="nothing")


def who(path: Path) -> list[str]:
    return [row["who"] for row in snapshot(path).execute("SELECT who FROM failures ORDER BY rowid")]


def while_running(ledger: Ledger, scene: Callable[[], Awaitable[None]]) -> None:
    async def body() -> None:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(ledger.run())
            await scene()
            loop.cancel()
        await ledger.close(status="finished", error="")

    asyncio.run(body())


def test_facts_are_written_in_order_and_settled(tmp_path: Path) -> None:
    ledger, path = Ledger(tmp_path / "ledger"), tmp_path / "ledger"

    async def scene() -> None:
        for fact in eventful().facts[1:]:
            ledger.record(fact)
        chain = await ledger.settled()
        rows = snapshot(path).execute("SELECT version, chain FROM versions ORDER BY version").fetchall()
        assert chain == rows[-1]["chain"]
        assert await ledger.chain_of(3) == rows[3]["chain"]

    while_running(ledger, scene)
    (launch,) = snapshot(path).execute("SELECT status, ended_at >= started_at AS ended FROM launches").fetchall()
    assert tuple(launch) == ("finished", 1)


def test_nothing_is_lost_or_written_twice_when_the_loop_is_cancelled(tmp_path: Path, monkeypatch: Any) -> None:
    """The thread that writes cannot be cancelled: it goes on, beside the write that `close` asks for."""
    path, begun, go_on = tmp_path / "ledger", threading.Event(), threading.Event()
    write = store.Store.write

    def held(self: Any, entries: Any) -> None:
        begun.set()
        assert go_on.wait(timeout=20)
        write(self, entries)

    monkeypatch.setattr(store.Store, "write", held)
    ledger = Ledger(path)

    async def body() -> None:
        loop = asyncio.ensure_future(ledger.run())
        for number in range(3):
            ledger.record(failure(number))
        await asyncio.to_thread(begun.wait)
        loop.cancel()
        await asyncio.wait([loop])
        ledger.record(failure(3))
        closing = asyncio.ensure_future(ledger.close(status="failed", error="terminated"))
        await asyncio.sleep(0)
        go_on.set()
        await closing

    asyncio.run(body())
    assert who(path) == ["0", "1", "2", "3"]
    assert [tuple(row) for row in snapshot(path).execute("SELECT status, error FROM launches")] == [
        ("failed", "terminated")
    ]


def test_whoever_begins_something_waits_while_too_much_is_unwritten(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for number in range(writer._BACKLOG):
        ledger.record(failure(number))

    async def scene() -> None:
        waiting = asyncio.ensure_future(ledger.room())
        assert not waiting.done()
        await waiting

    while_running(ledger, scene)
    assert len(who(tmp_path / "ledger")) == writer._BACKLOG


def test_a_ledger_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "missing" / "ledger")

    async def body() -> None:
        with pytest.raises(RunError, match=r"cannot open the ledger .*missing"):
            await ledger.run()
        await ledger.close(status="failed", error="")

    asyncio.run(body())


def test_a_full_disk_ends_the_run_and_keeps_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)

    async def body() -> None:
        ledger.record(failure(0))
        loop = asyncio.ensure_future(ledger.run())
        await ledger.settled()
        pages = ledger._store._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._store._connection.execute(f"PRAGMA max_page_count = {pages}")
        for number in range(1, 500):
            ledger.record(failure(number))
        with pytest.raises(RunError, match=r"cannot be written \(database or disk is full\); the run ends here"):
            await loop

    asyncio.run(body())
    assert who(path) == ["0"]


def test_every_fact_has_its_rows() -> None:
    known = store.Store.__dict__["_apply"].dispatcher.registry
    assert set(facts.Fact.__args__) <= set(known)
