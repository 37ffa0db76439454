"""The process in charge of a replay: the trainer's ranks connect to it as to a controller, and it re-enacts one.

Reads what to do from `order.json` of its run directory and leaves what came of it in `report.json`; a difference is a
result, not a failure. Started by `prl.replay.launch`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import cattrs

from prl import network
from prl.columns import ColumnFolder
from prl.compose.compose import Composition
from prl.compose.origin import identity
from prl.dispatch.controller import dismiss, root_cause
from prl.dispatch.hub import Hub
from prl.dispatch.trainer import Trainer
from prl.errors import CheckpointError, PrlError
from prl.ledger import event_log
from prl.ledger.events import Event
from prl.ledger.read import snapshot
from prl.replay.compare import DiffersError, Recorded
from prl.replay.history import head
from prl.replay.order import ORDER, REPORT, Order, Report
from prl.replay.reenact import Reenactment
from prl.run_dir import RunDir, read_json
from prl.score.costs import Costs


def main(composition: Composition, run_dir: RunDir) -> int:
    """Re-enact one launch; 0 whenever there is a report."""
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    order = cattrs.structure(read_json(run_dir.path / ORDER), Order)
    report = asyncio.run(act(composition, run_dir, order))
    run_dir.write_json(run_dir.path / REPORT, cattrs.unstructure(report))
    return 0


async def act(composition: Composition, run_dir: RunDir, order: Order) -> Report:
    """Re-enact a launch with the ranks that connect."""
    acted: list[Reenactment] = []
    difference, sentence = None, ""
    try:
        async with Hub(run_dir, network.address(composition.run)) as hub, asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(hub.serve())
            try:
                trainer, costs = await _trainer(hub, composition, head(Path(order.log))[1].step)
                acted.append(_reenactment(composition, run_dir, order, trainer, costs))
                await acted[0].run()
                if order.checkpoint and acted[0].trained == order.end:
                    await acted[0].save(Path(order.checkpoint), identity(composition))
            finally:
                await dismiss(hub)
                serving.cancel()
    except BaseException as raised:
        error = root_cause(raised)
        if not isinstance(error, PrlError):
            raise
        difference = error.difference if isinstance(error, DiffersError) else None
        sentence = str(error)
    trained, weights = (acted[0].trained, acted[0].weights) if acted else (0, 0)
    return Report(trained=trained, weights=weights, difference=difference, error=sentence)


async def _trainer(hub: Hub, composition: Composition, version: int) -> tuple[Trainer, Costs]:
    """Every rank, holding the version that the launch began with, and what sequences cost them."""
    workers = [await hub.hello("trainer", rank) for rank in range(composition.run.trainer.ranks)]
    for peer, hello in workers:
        if hello.version != version:
            raise CheckpointError(f"{peer.decode()} starts from version {hello.version}, the launch from {version}")
    return Trainer(hub, [peer for peer, _ in workers]), workers[0][1].costs


def _reenactment(
    composition: Composition, run_dir: RunDir, order: Order, trainer: Trainer, costs: Costs
) -> Reenactment:
    _, continued = head(Path(order.log))
    return Reenactment(
        composition=composition,
        continued=continued,
        events=_after_head(Path(order.log)),
        end=order.end,
        followed_by=head(Path(order.followed_by))[1] if order.followed_by else None,
        trainer=trainer,
        costs=costs,
        recorded=Recorded.of(snapshot(RunDir(order.run).ledger), order.launch),
        columns=ColumnFolder(run_dir.columns),
        on_step=_on_step(run_dir, tell=order.tell),
    )


def _after_head(log: Path) -> Iterator[tuple[float, Event]]:
    return islice(event_log.read(log), 2, None)


def _on_step(run_dir: RunDir, *, tell: bool) -> Callable[[int], bool]:
    def on_step(step: int) -> bool:
        if tell:
            print(f"step {step}: equal", flush=True)
        return not run_dir.stop.exists()

    return on_step
