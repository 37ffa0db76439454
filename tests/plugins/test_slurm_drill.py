"""What the drill says of nodes that do not come: NCCL would wait for them without a word."""

from __future__ import annotations

from datetime import timedelta

import pytest
from prl.train.rendezvous import kept_store
from prl_slurm.drill import all_here
from torch.distributed import TCPStore  # type: ignore[attr-defined]

SOON = timedelta(milliseconds=200)


@pytest.fixture
def store() -> TCPStore:
    _, store = kept_store("127.0.0.1", timedelta(seconds=30))
    return store


def test_ranks_that_do_not_come_are_named(store: TCPStore) -> None:
    store.set("here-2", "")
    with pytest.raises(RuntimeError, match=r"of 3 nodes, those of rank \[1\] did not come in 0\.2 s"):
        all_here(store, 0, 3, SOON)


def test_who_is_there_waits_for_nobody_else(store: TCPStore) -> None:
    store.set("here-0", "")
    all_here(store, 1, 2, timedelta(seconds=30))
    assert store.check(["here-1"])
