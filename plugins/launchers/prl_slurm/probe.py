"""`python -m prl_slurm.probe RUN NONCE HOST GPUS FREE_GB`: what one node can do for the run, in lines of JSON.

    first         what it sees: code as locked, the run's folder and how fast it writes there, clock, devices, address
    second        which of the other nodes it cannot reach, and how fast it reads what its neighbour wrote, once the
                  job's own process has said where they are
    from then on  how the drills went that it was told to take part in (`drill.py`)

What it is told is a file of the run's folder. Imports no torch. Judged by `preflight.py`, which ends it.
"""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prl import network
from prl.compose.compose import open_run
from prl.errors import PrlError
from prl.run_dir import RunDir, read_json
from prl.supervise import devices as driver

from prl_slurm import disk

_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
"""After torch's own deadline, for it to say so."""


def main(run: Path, nonce: str, host: str, gpus: int, least_gb: float) -> None:
    """Every line; without end, for others still knock."""
    report: dict[str, Any] = {"time": time.time(), "problems": [], "address": "", "port": 0}
    problems: list[str] = report["problems"]
    seen = Orders(run, nonce)
    problems += seen.visible() or [*written(seen.data(host), report), *filter(None, [disk.shortage(run, least_gb)])]
    problems += devices(gpus)
    report["devices"] = gpus if driver.has_driver() else 0
    try:
        address = network.address(open_run(RunDir(run)).run)
        listener = socket.create_server((address, 0))
        report["address"], report["port"] = listener.getsockname()
    except (PrlError, OSError) as error:
        problems.append(str(error))
        _say(report)
        return
    _say(report)
    with listener:
        peers: dict[str, tuple[str, int]] = seen.wait("peers")
        _say(
            {"unreachable": {peer: why for peer, where in peers.items() if (why := unreachable(*where))}}
            | red(seen, host, list(peers))
        )
        for index in range(sys.maxsize):
            _say(take_part(run, nonce, host, seen.wait(f"drill-{index}")))


class Orders:
    """What the job's own process wrote for its probes."""

    def __init__(self, run: Path, nonce: str) -> None:
        self._run = run
        self._file = run / "slurm" / f"preflight-{nonce}.json"

    def data(self, host: str) -> Path:
        return self._file.with_name(f"{self._file.stem}-{host}.data")

    def visible(self) -> list[str]:
        """What was just written where the job started must be here too."""
        if self._file.exists():
            return []
        here = f"does not see {self._run}, or not what was just written there"
        return [f"{here}: it must lie on a file system of all nodes"]

    def wait(self, key: str) -> Any:
        while not (found := (read_json(self._file) or {}).get(key)):
            time.sleep(_POLL_SECONDS)
        return found


# --- the run's folder -------------------------------------------------------------------------------------------------
def written(file: Path, report: dict[str, Any]) -> list[str]:
    """Leave some megabytes for the neighbour, and in the report how fast that went."""
    try:
        report["write"] = disk.write(file)
    except OSError as error:
        return [f"cannot write into {file.parent}: {error.strerror or error}"]
    return []


def red(seen: Orders, host: str, hosts: Sequence[str]) -> dict[str, Any]:
    """What the next node wrote: this one has it in no cache."""
    neighbour = hosts[(hosts.index(host) + 1) % len(hosts)] if host in hosts else host
    try:
        return {"read": disk.read(seen.data(neighbour)), "problems": []}
    except OSError as error:
        return {"problems": [f"cannot read what {neighbour} wrote: {error.strerror or error}"]}


# --- devices ----------------------------------------------------------------------------------------------------------
def devices(gpus: int) -> list[str]:
    """As many as the plan needs; where there is a driver to ask, one that answers and has counted no errors."""
    given = driver.given()
    if len(given) < gpus:
        return [f"has {len(given)} devices for this job, and the plan needs {gpus}"]
    if not gpus or not driver.has_driver():
        return []
    try:
        return unhealthy(given)
    except subprocess.TimeoutExpired:
        return [f"{driver.DRIVER} did not answer within {driver.DRIVER_SECONDS} s"]


def unhealthy(given: Sequence[str]) -> list[str]:
    """Uncorrected memory errors since the driver was loaded: NVML counts them, and what it does not count is N/A."""
    query = ["--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    done = driver.ask(f"--id={','.join(given)}", *query)
    if done.returncode:
        return [f"{driver.DRIVER}: {done.stdout.strip() or done.stderr.strip()}"]
    rows = [[word.strip() for word in row] for row in csv.reader(done.stdout.splitlines())]
    return [
        f"device {row[0]} has {row[1]} uncorrected memory errors (ECC)"
        for row in rows
        if len(row) == 2 and row[1].isdigit() and int(row[1])
    ]


# --- others -----------------------------------------------------------------------------------------------------------
def unreachable(address: str, port: int) -> str:
    """Why a connection from here fails, or nothing."""
    try:
        socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return ""


def take_part(run: Path, nonce: str, host: str, order: Mapping[str, Any]) -> dict[str, Any]:
    """`{"failed": {name: why}}` of the order's groups that this node is in, all at once; tells when each is ready."""
    mine = {name: members for name, members in order["groups"].items() if host in members}
    failed: dict[str, str] = {}

    def drill(name: str, members: Sequence[str]) -> None:
        words = (str(run), nonce, name, str(members.index(host)), str(len(members)), str(order["seconds"]))
        process = subprocess.Popen(
            [sys.executable, "-m", "prl_slurm.drill", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        if process.stdout.readline() == "ready\n":
            _say({"ready": name})
        try:
            _, errors = process.communicate(timeout=order["seconds"] + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            errors = "hangs, and does not say in what"
        if process.wait():
            failed[name] = next(iter(errors.strip().splitlines()[-1:]), f"exit code {process.returncode}")

    threads = [threading.Thread(target=drill, args=item) for item in mine.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"failed": failed}


def _say(report: Mapping[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(report)}\n")  # in one piece: drills speak from threads of their own
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
