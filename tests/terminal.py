"""A command on a terminal of its own, as its user has it, and what appears there."""

from __future__ import annotations

import os
import pty
import select
import subprocess
from collections.abc import Mapping, Sequence

PATIENCE = 120.0


def on_terminal(command: Sequence[str], *, typed: str, env: Mapping[str, str]) -> tuple[int, str]:
    """Run it, type once it has shown something, and wait for its end: exit code, and all that appeared."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command], stdin=its, stdout=its, stderr=its, env=dict(env), close_fds=True
    )
    os.close(its)
    shown = b""
    try:
        while chunk := _read(ours):
            if not shown:
                os.write(ours, typed.encode())
            shown += chunk
        return process.wait(PATIENCE), shown.decode().replace("\r\n", "\n")
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read(terminal: int) -> bytes:
    """What appears next; nothing once nobody has the terminal open any more."""
    ready, _, _ = select.select([terminal], [], [], PATIENCE)
    assert ready, f"nothing appeared for {PATIENCE:.0f} s"
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""
