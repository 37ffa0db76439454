"""`python -m prl_slurm.probe RUN NONCE GPUS`: what one node can do for the run, in two lines of JSON.

    first     what it sees: code as locked, the run's folder, its clock, its devices, its address
    second    which of the other nodes it cannot reach, once the job's own process has said where they are

Imports no torch. Judged by `preflight.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prl import network
from prl.compose.compose import open_run
from prl.errors import PrlError
from prl.run_dir import RunDir, read_json

_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.1


def main(run: Path, nonce: str, gpus: int) -> None:
    """Both lines; ends by itself when nobody ever says where the others are."""
    report: dict[str, Any] = {"time": time.time(), "problems": [], "address": "", "port": 0}
    problems: list[str] = report["problems"]
    listener = None
    problems += folder(run, nonce) + devices(gpus)
    try:
        address = network.address(open_run(RunDir(run)).run)
        listener = socket.create_server((address, 0))
        report["address"], report["port"] = listener.getsockname()
    except (PrlError, OSError) as error:
        problems.append(str(error))
    _say(report)
    if listener is not None:
        with listener:
            peers = _peers(run, nonce)
            _say({"unreachable": {host: why for host, where in peers.items() if (why := unreachable(*where))}})
            signal.pause()  # others still knock; the job's own process ends this one


def folder(run: Path, nonce: str) -> list[str]:
    """What was just written where the job started must be here too, and what is written here must stay."""
    seen = run / "slurm" / f"preflight-{nonce}.json"
    if not seen.exists():
        return [f"does not see {run}, or not what was just written there: it must lie on a file system of all nodes"]
    try:
        mine = seen.with_name(f"{seen.stem}-{socket.gethostname()}")
        mine.write_text(nonce)
        mine.unlink()
    except OSError as error:
        return [f"cannot write into {run}: {error.strerror}"]
    return []


def devices(gpus: int) -> list[str]:
    """As many as the plan needs, and a driver that answers where there is one to ask."""
    given = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if len(given) < gpus:
        return [f"has {len(given)} devices for this job, and the plan needs {gpus}"]
    if gpus and shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
        return [f"nvidia-smi: {done.stdout.strip() or done.stderr.strip()}"] if done.returncode else []
    return []


def unreachable(address: str, port: int) -> str:
    """Why a connection from here fails, or nothing."""
    try:
        socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return ""


def _peers(run: Path, nonce: str) -> dict[str, tuple[str, int]]:
    file = run / "slurm" / f"preflight-{nonce}.json"
    while not (peers := (read_json(file) or {}).get("peers")):
        time.sleep(_POLL_SECONDS)
    return {host: (address, port) for host, (address, port) in peers.items()}


def _say(report: dict[str, Any]) -> None:
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
