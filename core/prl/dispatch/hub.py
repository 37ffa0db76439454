"""The controller's end of the wire: one ZeroMQ ROUTER socket, and who waits for which message.

    GroupDone, Demonstrations, InFlightKept   answer the request with their number
    Failed                      fails the request with its number; otherwise a trainer's, or a fatal one, ends the run
    StepDone, Saved             go to the inboxes of the trainer rank that sent them, one for each kind
    Hello                       is kept until asked for; a second one is a successor's, and `on_return` is told

A peer must know the run's token (PLAIN authentication). A malformed message, and one that is not its sender's to send,
is counted, logged with its sender and answered with nothing: one broken worker harms nobody else. Knows nothing of what
the messages mean. Socket queues need no bound of their own: what is in flight is bounded by the dispatcher, one step,
and one checkpoint.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import attrs
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from prl import wire
from prl.dispatch.buffer import BoundedQueue
from prl.dispatch.change import Change
from prl.errors import InfrastructureError, RunError
from prl.messages import (
    TO_CONTROLLER,
    Cancel,
    Demonstrate,
    Demonstrations,
    Failed,
    GroupDone,
    Hello,
    InFlightKept,
    KeepInFlight,
    Role,
    RunGroup,
    Saved,
    StepDone,
)
from prl.run_dir import RunDir

log = logging.getLogger(__name__)

T = TypeVar("T")

_ANSWERS: dict[type, type] = {RunGroup: GroupDone, Demonstrate: Demonstrations, KeepInFlight: InFlightKept}
_INBOX = 4  # a rank answers one message at a time


class DisconnectedError(InfrastructureError):
    """A worker's connection is gone, so nothing can be sent to it."""


@attrs.define
class HubStatistics:
    """Messages since the hub was opened, and the bytes of what went through its socket."""

    received: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    malformed: int = 0
    unclaimed: int = 0
    """Answers to requests that were given up meanwhile."""


@attrs.frozen(kw_only=True, eq=False)
class _Request:
    """Who was asked, and for what."""

    peer: bytes
    kind: type
    answer: asyncio.Future[Any]


class Hub:
    """Opened once per run; `serve` must run for anything to arrive.

    Example:
        >>> async with Hub(run_dir) as hub, asyncio.TaskGroup() as tasks:
        ...     tasks.create_task(hub.serve())
        ...     hello = await hub.hello("environment", 0)
        ...     done = await hub.request(b"environment-0", RunGroup(request=0, ...))
    """

    def __init__(self, run_dir: RunDir, host: str = "127.0.0.1") -> None:
        self._run_dir = run_dir
        self._host = host
        self._context = zmq.asyncio.Context()
        self._authenticator = AsyncioAuthenticator(self._context)
        self._socket: Any = None
        self._peers: dict[tuple[Role, int], tuple[bytes, Hello]] = {}
        self._arrivals = Change()
        self.on_return: Callable[[bytes, Hello], None] = lambda peer, hello: None
        """Told of every engine and environment worker that takes the place of one that was there before."""
        self._known: set[tuple[Role, int]] = set()
        self._numbers = itertools.count(1)
        self._requests: dict[int, _Request] = {}
        self._inboxes: dict[bytes, BoundedQueue[StepDone]] = {}
        self._saves: dict[int, BoundedQueue[Saved]] = {}
        self.statistics = HubStatistics()

    # --- opening and closing ------------------------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        """Listen, and tell the workers where in `controller.json`."""
        self._authenticator.start()
        self._authenticator.configure_plain(passwords={wire.USER: self._run_dir.token()})
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.PLAIN_SERVER, 1),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 1),
            (zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.LINGER, 2000),
        ):
            self._socket.setsockopt(option, value)
        port = self._socket.bind_to_random_port(f"tcp://{self._host}")
        self._run_dir.write_json(
            self._run_dir.controller,
            {"address": f"tcp://{self._host}:{port}", "pid": os.getpid(), "host": socket.gethostname()},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run_dir.controller.unlink(missing_ok=True)  # nobody must wait for a controller that is gone
        self._socket.close()
        self._authenticator.stop()
        self._context.term()

    # --- what the controller says -------------------------------------------------------------------------------------
    async def send(self, peer: bytes, message: Any) -> None:
        """Hand a message to the wire; DisconnectedError when nobody is at the other end."""
        frames = wire.encode(message)
        try:
            await self._socket.send_multipart([peer, *frames], copy=False)
        except zmq.ZMQError as error:
            raise DisconnectedError(f"worker {peer.decode(errors='replace')} is not connected ({error})") from error
        self.statistics.sent_bytes += wire.size(frames)

    async def request(self, peer: bytes, message: RunGroup | Demonstrate | KeepInFlight) -> Any:
        """Send a message under a new `request` number and wait for its answer; cancelling tells the worker to stop."""
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._requests[number] = _Request(peer=peer, kind=_ANSWERS[type(message)], answer=answer)
        try:
            await self.send(peer, attrs.evolve(message, request=number))
            return await answer
        except asyncio.CancelledError:
            await self._cancel(peer, number)
            raise
        finally:
            del self._requests[number]

    async def _cancel(self, peer: bytes, request: int) -> None:
        try:
            await self.send(peer, Cancel(request=request))
        except DisconnectedError as error:
            log.info("request %d needs no cancelling: %s", request, error)

    async def reply(self, peer: bytes) -> StepDone:
        """The next report of a trainer rank."""
        inbox = self._inboxes[peer]
        report = await inbox.get()
        assert report is not None, "an inbox is never closed"
        return report

    async def saved(self, rank: int) -> Saved:
        """The next word of a trainer rank that its part of a checkpoint is written."""
        saved = await self._saves[rank].get()
        assert saved is not None, "an inbox is never closed"
        return saved

    async def hello(self, role: Role, index: int) -> tuple[bytes, Hello]:
        """The name of a worker's connection and how it introduced itself, once it has."""
        await self._arrivals.until(lambda: (role, index) in self._peers)
        return self._peers[role, index]

    def lose(self, role: Role, index: int, pid: int, sentence: str) -> bool:
        """A worker's process is gone: fail what was asked of it. False when it is not the one that is there."""
        peer, hello = self._peers.get((role, index), (b"", None))
        if hello is None or hello.pid != pid:
            return False
        del self._peers[role, index]
        self._give_up(peer, sentence)
        return True

    def _give_up(self, peer: bytes, sentence: str) -> None:
        for request in self._requests.values():
            if request.peer == peer and not request.answer.done():
                request.answer.set_exception(DisconnectedError(sentence))

    @property
    def present(self) -> set[tuple[Role, int]]:
        """Workers that have said Hello."""
        return set(self._peers)

    @property
    def peers(self) -> list[bytes]:
        return [peer for peer, _ in self._peers.values()]

    # --- what workers say ---------------------------------------------------------------------------------------------
    async def serve(self) -> None:
        """Receive for ever; RunError when a worker reports that the run cannot go on."""
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            peer, content = frames[0].bytes, [frame.buffer for frame in frames[1:]]
            self.statistics.received += 1
            self.statistics.received_bytes += wire.size(content)
            try:
                message = wire.decode(content, TO_CONTROLLER)
            except wire.WireError as error:
                self._refuse(peer, str(error))
            else:
                self._deliver(peer, message)
            await asyncio.sleep(0)  # a message that waits already is received without suspending

    def _deliver(self, peer: bytes, message: Any) -> None:
        match message:
            case Hello():
                self._welcome(peer, message)
            case GroupDone() | Demonstrations() | InFlightKept():
                self._answer(peer, message)
            case Failed():
                self._fail(peer, message)
            case StepDone():
                self._file(peer, self._inboxes.get(peer), message)
            case Saved():
                self._file(peer, self._saves.get(message.rank), message)

    def _welcome(self, peer: bytes, hello: Hello) -> None:
        if peer != f"{hello.role}-{hello.index}".encode():
            self._refuse(peer, f"Hello of {hello.role}-{hello.index}, which is not the name of its connection")
            return
        who = hello.role, hello.index
        if who in self._peers:
            self._give_up(peer, f"{peer.decode()} was started again")
        self._peers[who] = (peer, hello)
        if hello.role == "trainer":
            self._inboxes.setdefault(peer, BoundedQueue(f"trainer-{hello.index}", _INBOX))
            self._saves.setdefault(hello.index, BoundedQueue(f"trainer-{hello.index} saves", _INBOX))
        elif who in self._known:
            self.on_return(peer, hello)
        self._known.add(who)
        self._arrivals.notify()

    def _answer(self, peer: bytes, message: GroupDone | Demonstrations | InFlightKept) -> None:
        request = self._asked_of(peer, message.request)
        if request is None:
            self.statistics.unclaimed += 1
        elif isinstance(message, request.kind):
            request.answer.set_result(message)
        else:
            sentence = f"{type(message).__name__} in answer to a request for {request.kind.__name__}"
            self._refuse(peer, sentence)
            request.answer.set_exception(InfrastructureError(f"{peer.decode(errors='replace')}: {sentence}"))

    def _asked_of(self, peer: bytes, number: int) -> _Request | None:
        """The request with that number, if it still waits and that peer was asked."""
        request = self._requests.get(number)
        return request if request is not None and request.peer == peer and not request.answer.done() else None

    def _file(self, peer: bytes, inbox: BoundedQueue[T] | None, report: T) -> None:
        if inbox is None or not inbox.offer(report):
            self._refuse(peer, f"unexpected {type(report).__name__}")

    def _fail(self, peer: bytes, failure: Failed) -> None:
        worker = peer.decode(errors="replace")
        if failure.fatal:
            raise RunError(f"{worker} cannot go on: {failure.error}")
        if peer in self._inboxes:
            raise InfrastructureError(f"{worker} cannot go on: {failure.error}")
        request = self._asked_of(peer, failure.request)
        if request is not None:
            request.answer.set_exception(InfrastructureError(f"{worker}: {failure.error}"))
        else:
            log.warning("%s reports: %.1000s", worker, failure.error)

    def _refuse(self, peer: bytes, reason: str) -> None:
        self.statistics.malformed += 1
        log.warning("message from %s refused: %s", peer.decode(errors="replace"), reason)
