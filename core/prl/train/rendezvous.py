"""How the ranks of a trainer find each other: a key-value store on one address of the run's network, and nowhere else.

    agent 0      binds the store to a free port of its address, and writes rendezvous.json
    agent 1..    read rendezvous.json; every agent's ranks connect to the store

torch's own rendezvous opens its store on every interface of the host and on a port that is given or random on one host;
this one hands torch a socket that is bound already, and the run directory carries the port. The store asks nobody for a
secret. Knows nothing of ranks' work; called by `prl.train.agent`.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import MutableMapping
from datetime import timedelta

import attrs
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from prl import network
from prl.errors import InfrastructureError
from prl.run_dir import RunDir, read_json

BACKEND = "prl"
"""Name of the rendezvous in torch's registry."""
_PATIENCE = 600.0  # seconds for the agents to find each other: nodes load Python at their own pace
_POLL_SECONDS = 0.1
_CONNECT_TIME = timedelta(seconds=5)
_STORE_TIMEOUT = timedelta(seconds=300)  # torch's own


@attrs.frozen(kw_only=True)
class Meeting:
    """Which agents meet, and where."""

    node: int = 0
    """This agent among them."""
    nodes: int = 1
    address: str = network.LOOPBACK
    """Of this host, on the run's network."""
    run_dir: RunDir | None = None
    """Its rendezvous.json tells the other agents where the store is; None for an agent alone."""


class StoreRendezvous(RendezvousHandler):
    """One agent of the meeting; the first keeps the store for as long as it lives."""

    def __init__(self, meeting: Meeting, run_id: str) -> None:
        self._meeting = meeting
        self._run_id = run_id
        self._host, self._port, self._store = _open(meeting) if meeting.node == 0 else _join(meeting)

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Ranks connect to this store and open none of their own."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self._run_id, self._store)
        where = RendezvousStoreInfo(self._host, self._port)
        return RendezvousInfo(store, self._meeting.node, self._meeting.nodes, where)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """There is nobody else to tell."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _open(meeting: Meeting) -> tuple[str, int, Store]:
    port, store = kept_store(meeting.address)
    if meeting.run_dir is not None:
        where = {"host": meeting.address, "port": port, "attempt": _attempt(meeting.run_dir)}
        meeting.run_dir.write_json(meeting.run_dir.rendezvous, where)
    return meeting.address, port, store


def kept_store(address: str, timeout: timedelta = _STORE_TIMEOUT) -> tuple[int, TCPStore]:
    """A store on a free port of this address, and that port; it lives as long as what is returned."""
    listener = socket.create_server((address, 0))
    port: int = listener.getsockname()[1]
    descriptor = listener.detach()  # from here on the store owns it and closes it
    store = TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor, timeout=timeout
    )
    return port, store


def _join(meeting: Meeting) -> tuple[str, int, Store]:
    """What an earlier attempt left is waited past, and so is a store that is gone: the first agent may start again."""
    assert meeting.run_dir is not None, "agents that are not alone meet through the run directory"
    file, attempt = meeting.run_dir.rendezvous, _attempt(meeting.run_dir)
    deadline, refused = time.monotonic() + _PATIENCE, f"{file} does not say where"
    while time.monotonic() < deadline:
        where = read_json(file) or {}
        if where.get("attempt") == attempt:
            host, port = where["host"], where["port"]
            try:
                return host, port, TCPStore(host, port, is_master=False, timeout=_CONNECT_TIME)
            except RuntimeError as error:  # torch's network errors are all subclasses
                refused = f"{host}:{port} cannot be reached from here: {error}"
        time.sleep(_POLL_SECONDS)
    raise InfrastructureError(f"no store of trainer-0 within {_PATIENCE:.0f} s: {refused}; see trainer-0's log")


def _attempt(run_dir: RunDir) -> str:
    """Names the attempt as its token does, without telling the token."""
    return hashlib.sha256(run_dir.token().encode()).hexdigest()[:16]


def register() -> None:
    """Make `BACKEND` known to torch, which hands it the `meeting` of its configuration; again does no harm."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return StoreRendezvous(parameters.config["meeting"], parameters.run_id)


def keep_to(address: str, environment: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL in processes with this environment listen on that address's interface, unless one is named."""
    for variable, name in network.interfaces(address).items():
        environment.setdefault(variable, name)
