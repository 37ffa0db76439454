"""Where the processes of a run listen: one address per host, on the network that the run's config names.

    auto        loopback where the launcher keeps to one machine, otherwise hostname
    loopback    this machine alone
    hostname    the address this host's name means
    ib0         the address of that interface
    10.1.0.0/16 this host's address in that network

Every port is whatever is free. Torch-free; called by every process that listens.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator

from prl.compose.config import Run
from prl.errors import UserError

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B


def address(run: Run) -> str:
    """IPv4 address to bind to on this host; UserError when it has none that the config means."""
    network = run.run.network
    if network == "auto":
        network = "hostname" if run.launcher.spans_hosts else "loopback"
    return resolve(network)


def resolve(network: str) -> str:
    """What one of the words above comes to on this host, `auto` excepted."""
    if network == "loopback":
        return LOOPBACK
    if network == "hostname":
        return _of_this_host()
    found = _in_network(network) if "/" in network else dict(_names()).get(network)
    if found is None:
        here = ", ".join(f"{name} {where.ip}" for name, where in _names())
        raise UserError(f"run.network = {network!r} is nowhere on {socket.gethostname()}, which has {here}")
    return str(found.ip)


def interface(host: str) -> str | None:
    """The interface whose network holds one of this host's addresses."""
    return next((name for name, where in _names() if ipaddress.IPv4Address(host) in where.network), None)


def interfaces(host: str) -> dict[str, str]:
    """Variables that have gloo and NCCL listen on that address's interface; none where no interface is known.

    Left alone, both listen where the host's name points to, which may be its address on another network.
    """
    name = interface(host)
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def free_port(host: str) -> int:
    """For programs that want a number; whoever takes it in between makes them fail."""
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _of_this_host() -> str:
    name = socket.gethostname()
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise UserError(
            f"this host's own name, {name}, has no address ({error.strerror}); name an interface or a network "
            "(run.network = 'ib0', '10.1.0.0/16')"
        ) from error


def _in_network(network: str) -> ipaddress.IPv4Interface | None:
    try:
        wanted = ipaddress.IPv4Network(network)
    except ValueError as error:
        raise UserError(f"run.network = {network!r} is no IPv4 network: {error}") from None
    return next((where for _, where in _names() if where.ip in wanted), None)


def _names() -> Iterator[tuple[str, ipaddress.IPv4Interface]]:
    """Every interface of this host that has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                host, mask = (_ask(any_socket, request, name) for request in (_SIOCGIFADDR, _SIOCGIFNETMASK))
            except OSError:  # it has none
                continue
            yield name, ipaddress.IPv4Interface(f"{host}/{mask}")


def _ask(any_socket: socket.socket, request: int, name: str) -> str:
    """netdevice(7): an ifreq carries the name in 16 bytes, then a sockaddr_in with the address at 4."""
    answer = fcntl.ioctl(any_socket.fileno(), request, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])
