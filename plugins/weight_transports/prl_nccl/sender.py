"""Trainer side: a rank keeps its part of the newest versions in host memory and sends it to whoever asks.

    engine's worker ── token, version, device ──► this rank's socket
                    ◄── port of a store, backend ──
                    ◄══ process group of the two: the bytes of the part ══
                    ── closes the socket: everything arrived ──►

Each transfer has a thread, a store and a group of its own: a receiver that is lost or hangs costs its thread until the
deadline, and nobody else anything. The newest `KEPT` versions exist at a time, so that a lost `retire` cannot fill the
memory; who asks for an older one is told that it is gone.
"""

from __future__ import annotations

import hmac
import json
import logging
import mmap
import os
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from prl import network
from prl.compose.compose import open_run
from prl.run_dir import RunDir
from prl.train.rendezvous import kept_store
from prl.types import Manifest
from prl.weights.tensors import write_raw
from torch import Tensor

from prl_nccl import NcclConfig
from prl_nccl.pair import SENDER, backend_for, joined, name_of_device

log = logging.getLogger(__name__)

KEPT = 3
LONGEST_ASK = 4096
"""Bytes."""
ASK_SECONDS = 30.0


class NcclSender:
    """One trainer rank's part of every version."""

    def __init__(self, *, address: str, token: str, patience: Callable[[int], float]) -> None:
        self._held: dict[int, Tensor] = {}
        """Version -> [bytes] uint8."""
        self._address = address
        self._token = token
        self._patience = patience
        self._device = "cpu"
        self._server = _Server((address, 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def location(self) -> str:
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """Keep this rank's part of a version; the oldest beyond `KEPT` goes."""
        with _anonymous_file() as file:
            records = write_raw(file, self._noting_device(tensors))
            size = os.fstat(file.fileno()).st_size
            self._held[version] = _mapped(file, size)
        for old in sorted(self._held)[:-KEPT]:
            self.retire(old)
        return Manifest.single(version=version, location=self.location, tensors=records)

    def _noting_device(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if tensor.is_cuda:
                self._device = name_of_device()
            yield name, tensor

    def retire(self, version: int) -> None:
        self._held.pop(version, None)

    def close(self) -> None:
        """Who asks from now on is refused; what is being sent arrives, if this process lives that long."""
        self._server.shutdown()
        self._server.server_close()
        self._held.clear()

    # --- a transfer, in its own thread --------------------------------------------------------------------------------
    def serve(self, ask: dict[str, Any], answer: Callable[[dict[str, Any]], None], done: Callable[[], None]) -> None:
        """Send what is asked for, or say why not; RuntimeError when the other side is lost."""
        content, refusal = self._held.get(ask["version"]), ""
        if not hmac.compare_digest(str(ask["token"]), self._token):
            refusal = "the token is not this run's"
        elif content is None:
            refusal = f"version {ask['version']} is gone from {self.location}"
        if content is None or refusal:
            answer({"error": refusal})
            return
        backend = backend_for(self._device, str(ask["device"]))
        seconds = self._patience(len(content))
        port, store = kept_store(self._address, timedelta(seconds=seconds))
        answer({"port": port, "backend": backend, "nbytes": len(content)})
        with joined(backend, SENDER, store, address=self._address, seconds=seconds) as pair:
            pair.push(content)
            done()  # what was sent may not have left this process yet


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], sender: NcclSender) -> None:
        self.sender = sender
        super().__init__(address, _Handler)


class _Handler(socketserver.StreamRequestHandler):
    timeout = ASK_SECONDS

    def handle(self) -> None:
        """One transfer. The other side notices by itself when it fails; this one only says so."""
        sender = cast(_Server, self.server).sender
        try:
            sender.serve(dict(json.loads(self.rfile.readline(LONGEST_ASK))), self._answer, self._done)
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:  # torch's are RuntimeErrors
            log.warning("%s was sent no weights: %s", self.client_address[0], error)

    def _answer(self, answer: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _done(self) -> None:
        self.rfile.read(1)


def _anonymous_file() -> BinaryIO:
    """Memory where there are files of it, else a file without a name."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("prl-nccl"), "w+b")
    return cast(BinaryIO, tempfile.TemporaryFile())


def _mapped(file: BinaryIO, size: int) -> Tensor:
    """[size] uint8; it stays when the file is closed."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)


def send(config: NcclConfig, run_dir: Path, rank: int) -> NcclSender:
    run = RunDir(run_dir)
    address = network.address(open_run(run).run)
    return NcclSender(address=address, token=run.token(), patience=config.patience)
