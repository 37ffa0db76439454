"""Engine side: asks every trainer rank for what it wants of its part, all at once, and verifies what comes.

Between two versions the group with each rank is kept, as long as its address is in the manifest: a trainer that was
started again is a new address, and no more. Called in each worker of an engine, in a thread.
"""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import attrs
import torch
from prl.errors import InfrastructureError
from prl.run_dir import RunDir
from prl.types import Manifest, TensorRecord, WeightPart
from prl.weights.tensors import LOT, lots, verified, verified_on_device
from torch import Tensor
from torch.distributed import TCPStore

from prl_nccl import NcclConfig
from prl_nccl.pair import CHANNELS, RECEIVER, Pair, device_here, left, name_of

THREADS = 16
"""Groups that are made at a time."""
LONGEST_ANSWER = 4096
"""Bytes."""
WINDOW = 3 * LOT
"""Bytes that are waited for at a time, from all ranks."""


@attrs.frozen(eq=False)
class Lot:
    """Tensors of a part that lie side by side."""

    records: Sequence[TensorRecord]

    @property
    def start(self) -> int:
        return self.records[0].offset

    @property
    def end(self) -> int:
        return self.records[-1].offset + self.records[-1].nbytes


def lots_of(part: WeightPart) -> list[Lot]:
    return [Lot(records) for records in lots(part.tensors)]


@attrs.frozen(eq=False)
class Link:
    """A trainer rank, and the group with it."""

    location: str
    connection: socket.socket
    lines: Any
    pair: Pair

    def ask(self, version: int, lots: Sequence[Lot], deadline: float) -> dict[str, Any]:
        """What the rank answers; if it has the version, its bytes come next."""
        question = {"version": version, "ranges": [(lot.start, lot.end) for lot in lots]}
        return _asked(self.connection, self.lines, question, deadline)

    def close(self) -> None:
        self.pair.close()
        self.lines.close()
        self.connection.close()


@attrs.frozen(eq=False)
class Fetch:
    """One version on its way."""

    version: int
    deadline: float
    """Of `time.monotonic`."""
    device: torch.device = attrs.field(factory=device_here)
    channels: int = CHANNELS
    """Of NCCL, for each group that has to be made."""

    @property
    def what(self) -> str:
        return f"weights of version {self.version}"


@attrs.frozen(eq=False)
class NcclReceiver:
    """One worker of an engine."""

    config: NcclConfig
    token: str
    _links: dict[str, Link] = attrs.field(factory=dict)
    """Location -> the group with that rank, while no version comes through it."""

    def fetch(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, verified: on this thread's GPU where NCCL brings it there, else in host memory.

        Who copies each and gives it up before taking the next needs room for `WINDOW` on the device, and no more.

        Raises:
            InfrastructureError: a rank is gone, has the version no more, or its bytes are not those that were sent.
        """
        coming = [(part.location, lots_of(part)) for part in manifest.parts if part.tensors]
        deadline = time.monotonic() + self.config.patience(manifest.nbytes)
        fetch = Fetch(manifest.version, deadline, channels=max(1, CHANNELS // max(1, len(coming))))
        links: list[Link] = []
        try:
            self._begin(coming, links, fetch)
            yield from _arriving([(link, lots) for link, (_, lots) in zip(links, coming, strict=True)], fetch)
        except BaseException:  # also where whoever fetches does not go on
            for link in links:
                link.close()
            raise
        for link in links:
            self._keep(link)
        for location in self._links.keys() - {part.location for part in manifest.parts}:
            self._links.pop(location).close()

    def _begin(self, coming: Sequence[tuple[str, Sequence[Lot]]], links: list[Link], fetch: Fetch) -> None:
        """Ask every rank for these lots, all at once; `links` are those that were made, also when another is not."""
        with ThreadPoolExecutor(THREADS) as pool:
            asked = [pool.submit(self._ask, *rank, fetch) for rank in coming]
        failed = [future.exception() for future in asked]
        links += [future.result() for future, error in zip(asked, failed, strict=True) if error is None]
        if (error := next(filter(None, failed), None)) is not None:
            raise error

    def _ask(self, location: str, lots: Sequence[Lot], fetch: Fetch) -> Link:
        """The link through which they come; where one was kept that stands no more, it is made anew."""
        with _naming(fetch.what, location):
            answer = None
            if (link := self._links.pop(location, None)) is not None:
                try:
                    answer = link.ask(fetch.version, lots, fetch.deadline)
                except (OSError, ValueError):
                    link.close()
            if link is None or answer is None:
                link = self._connected(location, fetch)
                answer = link.ask(fetch.version, lots, fetch.deadline)
            if "error" in answer:
                link.close()
                raise InfrastructureError(f"{fetch.what}: {answer['error']}")
            return link

    def _connected(self, location: str, fetch: Fetch) -> Link:
        connection = socket.create_connection(_address(location, fetch.what), timeout=left(fetch.deadline))
        lines = connection.makefile("rb")
        hello = {"token": self.token, "device": name_of(fetch.device), "channels": fetch.channels}
        try:
            answer = _asked(connection, lines, hello, fetch.deadline)
            if "error" in answer:
                raise InfrastructureError(f"{fetch.what}: {answer['error']}")
            there, patience = connection.getpeername()[0], timedelta(seconds=left(fetch.deadline))
            pair = Pair.join(
                answer["backend"],
                RECEIVER,
                TCPStore(there, int(answer["port"]), is_master=False, timeout=patience),
                connection=connection,
                device=fetch.device,
                channels=fetch.channels,
                seconds=left(fetch.deadline),
            )
        except BaseException:
            lines.close()
            connection.close()
            raise
        return Link(location, connection, lines, pair)

    def _keep(self, link: Link) -> None:
        if (other := self._links.get(link.location)) is not None:  # two versions came at a time
            other.close()
        self._links[link.location] = link

    def close(self) -> None:
        while self._links:
            self._links.popitem()[1].close()


def _arriving(coming: Sequence[tuple[Link, Sequence[Lot]]], fetch: Fetch) -> Iterator[tuple[str, Tensor]]:
    """From all ranks in turn, a window ahead of what is verified."""
    turns = zip_longest(*([(link, lot) for lot in lots] for link, lots in coming))
    ahead: deque[tuple[Link, Lot, Tensor, list[Any]]] = deque()
    nbytes = 0
    for link, lot in filter(None, chain.from_iterable(turns)):
        while ahead and nbytes + lot.end - lot.start > WINDOW:
            nbytes -= len(ahead[0][2])
            yield from _landed(*ahead.popleft(), fetch)
        with _naming(fetch.what, link.location):
            ahead.append((link, lot, *link.pair.post(lot.start, lot.end)))
        nbytes += lot.end - lot.start
    while ahead:
        yield from _landed(*ahead.popleft(), fetch)


def _landed(link: Link, lot: Lot, content: Tensor, works: list[Any], fetch: Fetch) -> Iterator[tuple[str, Tensor]]:
    with _naming(fetch.what, link.location):
        for work in works:
            link.pair.wait(work, fetch.deadline)
    if content.is_cuda:
        with link.pair.on_stream():
            tensors = list(verified_on_device(content, lot.records, what=fetch.what, start=lot.start))
        yield from tensors
    else:
        yield from verified(content.numpy().data, lot.records, what=fetch.what, start=lot.start)


@contextmanager
def _naming(what: str, location: str) -> Iterator[None]:
    """Whatever fails in the block is that rank's."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # torch's are RuntimeErrors
        raise InfrastructureError(f"{what} did not come from {location}: {error!s:.500}") from error


def _asked(connection: socket.socket, lines: Any, question: dict[str, Any], deadline: float) -> dict[str, Any]:
    connection.settimeout(left(deadline))
    connection.sendall(json.dumps(question).encode() + b"\n")
    answer: dict[str, Any] = json.loads(lines.readline(LONGEST_ANSWER))
    return answer


def _address(location: str, what: str) -> tuple[str, int]:
    host, _, port = location.rpartition(":")
    if not host or not port.isdecimal():
        raise InfrastructureError(f"{what}: {location!r:.200} is no address of a trainer rank")
    return host, int(port)


def receive(config: NcclConfig, run_dir: Path) -> NcclReceiver:
    return NcclReceiver(config, RunDir(run_dir).token())
