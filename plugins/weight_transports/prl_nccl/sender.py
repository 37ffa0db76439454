"""Trainer side: a rank keeps its part of the newest versions in host memory and sends what it is asked for.

    engine's worker ── token, device, channels ──► this rank's socket
                    ◄── port of a store, backend ──
                    ══ process group of the two ══
    for each version:
                    ── version, ranges of bytes ──►
                    ◄── whether it is here ──
                    ◄══ the bytes ══

Each worker has a thread, a store and a group of its own for as long as its connection stands: one that is lost ends
them, one that hangs in a transfer does at its deadline, and neither costs anybody else anything. The newest `KEPT`
versions exist at a time, so that a lost `retire` cannot fill the memory; who asks for an older one is told that it is
gone. The memory is the host's, pinned where the rank computes on a GPU: the weights themselves change with the next
step, and the device has no room for them twice.
"""

from __future__ import annotations

import hmac
import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from prl import network
from prl.compose.compose import open_run
from prl.run_dir import RunDir
from prl.train.rendezvous import kept_store
from prl.types import Manifest
from prl.weights.host_memory import HostMemory, cells, hold
from torch import Tensor

from prl_nccl import NcclConfig
from prl_nccl.pair import CHANNELS, SENDER, Pair, backend_for, device_here, name_of

log = logging.getLogger(__name__)

KEPT = 3
LONGEST_HELLO = 4096
"""Bytes, of somebody unknown."""
LONGEST_ASK = 16 << 20
"""Bytes: 100,000 tensors that do not lie side by side are 2.5 MB."""
HELLO_SECONDS = 30.0


class NcclSender:
    """One trainer rank's part of every version."""

    def __init__(self, *, address: str, token: str, patience: Callable[[int], float]) -> None:
        self._held: dict[int, HostMemory] = {}
        self._address = address
        self._token = token
        self._patience = patience
        self._device = device_here()
        self._server = _Server((address, 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self._counting = threading.Lock()
        self.sent_bytes: dict[int, int] = {}
        """Version -> bytes that workers have been sent of it."""

    @property
    def location(self) -> str:
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Keep this rank's part of a version; the oldest beyond `KEPT` goes, and this one takes its memory."""
        for old in sorted(self._held.keys() - {version})[: 1 - KEPT]:
            self.retire(old)
        memory = HostMemory(pinned=self._device.type == "cuda")
        records = hold(memory, self._noting_device(memory, tensors))
        self._held[version] = memory
        return Manifest.single(version=version, location=self.location, tensors=records)

    def _noting_device(self, memory: HostMemory, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if tensor.is_cuda:
                self._device, memory.pinned = tensor.device, True
            yield name, tensor

    def retire(self, version: int) -> None:
        self._held.pop(version, None)
        self.sent_bytes.pop(version, None)

    def close(self) -> None:
        """Who asks from now on is refused; what is being sent arrives, if this process lives that long."""
        self._server.shutdown()
        self._server.server_close()
        self._held.clear()

    # --- a worker, in its own thread ----------------------------------------------------------------------------------
    def meet(
        self, hello: dict[str, Any], connection: socket.socket, answer: Callable[[dict[str, Any]], None]
    ) -> Pair | None:
        """The group with whoever says hello, None where it is refused; RuntimeError when the other side is lost."""
        if not hmac.compare_digest(str(hello["token"]), self._token):
            answer({"error": "the token is not this run's"})
            return None
        backend = backend_for(name_of(self._device), str(hello["device"]))
        seconds = self._patience(0)
        port, store = kept_store(self._address, timedelta(seconds=seconds))
        answer({"port": port, "backend": backend})
        channels = min(max(1, int(hello["channels"])), CHANNELS)
        return Pair.join(
            backend,
            SENDER,
            store,
            connection=connection,
            device=self._device,
            channels=channels,
            seconds=seconds,
        )

    def serve(self, pair: Pair, ask: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """Send what is asked for, or say why not; RuntimeError when the other side is lost."""
        version, memory = int(ask["version"]), self._held.get(int(ask["version"]))
        if memory is None:
            answer({"error": f"version {version} is gone from {self.location}"})
            return
        try:
            spans = [memory.span(*cell) for start, end in ask["ranges"] for cell in cells(start, end)]
        except IndexError as error:
            answer({"error": f"version {version} at {self.location} is another: {error}"})
            return
        nbytes = sum(map(len, spans))
        with self._counting:
            self.sent_bytes[version] = self.sent_bytes.get(version, 0) + nbytes
        answer({"nbytes": nbytes})
        pair.push(spans, time.monotonic() + self._patience(nbytes))


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], sender: NcclSender) -> None:
        self.sender = sender
        self.connections: set[socket.socket] = set()
        self.closed = False
        super().__init__(address, _Handler)

    def server_close(self) -> None:
        """Nobody is heard any more, on connections that stand either."""
        self.closed = True
        super().server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)


class _Handler(socketserver.StreamRequestHandler):
    timeout = HELLO_SECONDS

    def handle(self) -> None:
        """One worker. The other side notices by itself when it fails; this one only says so."""
        server, pair = cast(_Server, self.server), None
        server.connections.add(self.connection)
        try:
            hello = dict(json.loads(self.rfile.readline(LONGEST_HELLO)))
            pair = server.sender.meet(hello, self.connection, self._answer)
            if pair is None:
                return
            self.connection.settimeout(None)  # until the next version
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            while (line := self.rfile.readline(LONGEST_ASK)) and not server.closed:
                server.sender.serve(pair, dict(json.loads(line)), self._answer)
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:  # torch's are RuntimeErrors
            log.warning("%s was sent no weights: %s", self.client_address[0], error)
        finally:
            server.connections.discard(self.connection)
            if pair is not None:
                pair.close()

    def _answer(self, answer: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def send(config: NcclConfig, run_dir: Path, rank: int) -> NcclSender:
    run = RunDir(run_dir)
    address = network.address(open_run(run).run)
    return NcclSender(address=address, token=run.token(), patience=config.patience)
