"""The trainer as the controller sees it: what becomes of an order that reaches nobody."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prl.dispatch.hub import DisconnectedError
from prl.dispatch.trainer import Trainer


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
