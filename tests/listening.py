"""Where a process listens, read from /proc."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"

needs_proc = pytest.mark.skipif(not _TABLES[0].exists(), reason="reads /proc/net/tcp")


def addresses(pid: int) -> set[str]:
    """Addresses of the sockets on which process `pid` accepts connections."""
    inodes = _listening_inodes()
    sockets = {link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if _is_socket(link)}
    return {address for inode, address in inodes.items() if f"socket:[{inode}]" in sockets}


def _is_socket(link: Path) -> bool:
    try:
        return link.readlink().name.startswith("socket:")
    except FileNotFoundError:  # closed meanwhile
        return False


def _listening_inodes() -> dict[str, str]:
    rows = [line.split() for table in _TABLES if table.exists() for line in table.read_text().splitlines()[1:]]
    return {row[9]: _address(row[1]) for row in rows if row[3] == _LISTEN}


def _address(field: str) -> str:
    """`0100007F:1F90` -> 127.0.0.1: words of four bytes in the host's order."""
    digits = field.partition(":")[0]
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
