"""Engine side: asks every trainer rank for its part of a version, all at once, and verifies what comes.

Nothing is kept between two versions, so that a trainer that was started again is a new address in the manifest and no
more. Called in each worker of an engine, in a thread.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
from prl.errors import InfrastructureError
from prl.run_dir import RunDir
from prl.types import Manifest, WeightPart
from prl.weights.tensors import verified
from torch import Tensor
from torch.distributed import TCPStore

from prl_nccl import NcclConfig
from prl_nccl.pair import RECEIVER, joined, name_of_device

THREADS = 8
LONGEST_ANSWER = 4096
"""Bytes."""


@attrs.frozen
class NcclReceiver:
    """One worker of an engine."""

    config: NcclConfig
    token: str

    def fetch(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, verified, in host memory.

        Raises:
            InfrastructureError: a rank is gone, has the version no more, or its bytes are not those that were sent.
        """
        what = f"weights of version {manifest.version}"
        device = name_of_device()
        with ThreadPoolExecutor(THREADS) as pool:
            coming = [pool.submit(self._fetch, part, manifest.version, device, what) for part in manifest.parts]
            contents = [part.result() for part in coming]
        for part, content in zip(manifest.parts, contents, strict=True):
            yield from verified(content, part.tensors, what=what)

    def _fetch(self, part: WeightPart, version: int, device: str, what: str) -> memoryview:
        """The bytes of one rank's part."""
        nbytes = max((record.offset + record.nbytes for record in part.tensors), default=0)
        seconds = self.config.patience(nbytes)
        try:
            with socket.create_connection(_address(part.location, what), timeout=seconds) as connection:
                ask = {"token": self.token, "version": version, "device": device}
                answer = _answered(connection, ask)
                if "error" in answer:
                    raise InfrastructureError(f"{what}: {answer['error']}")
                if answer["nbytes"] != nbytes:
                    raise InfrastructureError(
                        f"{what}: {part.location} has {answer['nbytes']} bytes where {nbytes} were announced"
                    )
                content = torch.empty(nbytes, dtype=torch.uint8)
                self._pull(content, answer, connection, seconds)
        except (OSError, ValueError, KeyError, RuntimeError) as error:  # torch's are RuntimeErrors
            raise InfrastructureError(f"{what} did not come from {part.location}: {error!s:.500}") from error
        return content.numpy().data

    def _pull(self, content: Tensor, answer: dict[str, Any], connection: socket.socket, seconds: float) -> None:
        there, here = connection.getpeername()[0], connection.getsockname()[0]
        patience = timedelta(seconds=seconds)
        store = TCPStore(there, int(answer["port"]), is_master=False, timeout=patience)
        with joined(answer["backend"], RECEIVER, store, address=here, seconds=seconds) as pair:
            pair.pull(content)

    def close(self) -> None:
        """Nothing is held."""


def _answered(connection: socket.socket, ask: dict[str, Any]) -> dict[str, Any]:
    connection.sendall(json.dumps(ask).encode() + b"\n")
    with connection.makefile("rb") as lines:
        answer: dict[str, Any] = json.loads(lines.readline(LONGEST_ANSWER))
    return answer


def _address(location: str, what: str) -> tuple[str, int]:
    host, _, port = location.rpartition(":")
    if not host or not port.isdecimal():
        raise InfrastructureError(f"{what}: {location!r:.200} is no address of a trainer rank")
    return host, int(port)


def receive(config: NcclConfig, run_dir: Path) -> NcclReceiver:
    return NcclReceiver(config, RunDir(run_dir).token())
