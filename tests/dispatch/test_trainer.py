"""The trainer as the controller sees it: what becomes of an order that reaches nobody."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prl.dispatch.hub import DisconnectedError
from prl.dispatch.trainer import Trainer
from prl.errors import InfrastructureError
from prl.messages import StepDone
from prl.types import Batch


class EmptyHub:
    """A hub to which no rank is connected any more."""

    def __init__(self) -> None:
        self.tried = asyncio.Event()

    async def send(self, peer: bytes, message: Any) -> None:
        self.tried.set()
        raise DisconnectedError(f"worker {peer.decode()} is not connected")


def trainer(hub: Any, **options: Any) -> Trainer:
    return Trainer(hub, [b"trainer-0"], **options)


def test_a_rank_that_is_gone_is_its_launcher_s_to_name():
    async def main() -> None:
        hub = EmptyHub()
        order = asyncio.create_task(trainer(hub).retire(0))
        await hub.tried.wait()
        await asyncio.sleep(0)
        assert not order.done()
        order.cancel()  # as the launcher does that ends the controller
        with pytest.raises(asyncio.CancelledError):
            await order

    asyncio.run(main())


def test_a_rank_that_nobody_names_ends_the_run_in_the_end():
    async def main() -> None:
        with pytest.raises(DisconnectedError, match="worker trainer-0 is not connected"):
            await trainer(EmptyHub(), patience=0.0).retire(0)

    asyncio.run(main())


class SlowHub:
    """Its rank answers the first steps at once, and then no more."""

    def __init__(self, answers: int) -> None:
        self._answers = answers

    async def send(self, peer: bytes, message: Any) -> None:
        """It takes every order."""

    async def reply(self, peer: bytes) -> StepDone:
        self._answers -= 1
        if self._answers < 0:
            await asyncio.Event().wait()
        return StepDone(step=1, version=1, sums={}, values={}, seconds={})


def batch(step: int) -> Batch:
    return Batch(step=step, version=step - 1, phase="rl", ranks=((),), token_counts={})


def test_a_step_that_takes_far_longer_than_those_before_is_given_up():
    async def main() -> None:
        ranks = trainer(SlowHub(answers=1), patience=0.05)
        await ranks.step(batch(1), learning_rate=0.1, publish=False)
        with pytest.raises(InfrastructureError, match=r"step 2 .* was not trained within"):
            await ranks.step(batch(2), learning_rate=0.1, publish=False)

    asyncio.run(main())
