"""How the ranks of a trainer on one host find each other: a key-value store that listens on loopback alone.

torch's own rendezvous opens its store on every interface of the host, and the store asks nobody for a secret. This one
hands torch a socket that is already bound to loopback. Knows nothing of ranks' work; called by `prl.train.agent`.
"""

from __future__ import annotations

import socket
from collections.abc import MutableMapping

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

LOOPBACK = "127.0.0.1"
BACKEND = "prl-loopback"
"""Name of the rendezvous in torch's registry."""


class LoopbackRendezvous(RendezvousHandler):
    """One agent, which keeps the store for its ranks as long as it lives."""

    def __init__(self, run_id: str) -> None:
        listener = socket.create_server((LOOPBACK, 0))
        self._run_id = run_id
        self._port: int = listener.getsockname()[1]
        # From here on the store owns the descriptor and closes it.
        self._store = TCPStore(
            LOOPBACK, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Ranks connect to this store and open none of their own."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

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


def register() -> None:
    """Make `BACKEND` known to torch; once per process is enough, again does no harm."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)


def keep_to_loopback(environment: MutableMapping[str, str]) -> None:
    """Have gloo and NCCL, in processes with this environment, listen on loopback, unless it names an interface.

    Left alone, both listen where the host's name points to, which may be its address on a network.
    """
    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        environment.setdefault("NCCL_SOCKET_IFNAME", interface)
