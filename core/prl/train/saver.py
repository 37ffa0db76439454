"""Snapshots go to disk in a thread, while the rank trains on.

One at a time: the controller asks for the next when it was told that this one is written. The word goes over a
connection of the thread's own, because the rank's belongs to its main thread, which may be deep in a step. Called by
`prl.train.worker`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from prl.messages import Failed, Saved
from prl.train.checkpoint import Snapshot
from prl.wire import Connection


class Saver:
    """Writes what it is given; `connect` opens a connection to the controller."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._thread: threading.Thread | None = None

    def start(self, snapshot: Snapshot, checkpoint: Path, *beside: Callable[[Path], object]) -> None:
        """Write a snapshot into the folder `checkpoint` and tell the controller; returns at once.

        `beside` are called first: they write what lies in the checkpoint and is no part of the state.
        """
        self.close()
        # A daemon: a rank that must end at once, because the run failed, does not wait for the disk.
        arguments = snapshot, checkpoint, beside
        self._thread = threading.Thread(target=self._write, args=arguments, name="saver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until what was started is written."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, snapshot: Snapshot, checkpoint: Path, beside: Sequence[Callable[[Path], object]]) -> None:
        with closing(self._connect()) as connection:
            try:
                for write in beside:
                    write(checkpoint)
                files = snapshot.write(checkpoint)
            except Exception as error:  # whatever it is, the controller must not wait for ever
                sentence = f"the checkpoint {checkpoint} cannot be written ({error})"
                connection.send(Failed(error=f"{sentence}; `prl resume` goes on from the last", fatal=True))
            else:
                connection.send(Saved(step=snapshot.record.step, rank=snapshot.rank, files=files))
