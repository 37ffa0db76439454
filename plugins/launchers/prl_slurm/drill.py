"""`python -m prl_slurm.drill RUN NONCE NAME RANK SIZE SECONDS`: what training will ask of a node, once and small.

    a product on every device, whose numbers are known ─► "ready" ─► a sum over the ranks of NAME, by NCCL or gloo

Ranks meet as the trainer's do: rank 0 binds a store to its address of the run's network, and a file of the run's folder
says where. Started by `probe.py`, which reads that word; what fails is the last line of standard error.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from prl import network
from prl.compose.compose import open_run
from prl.run_dir import RunDir, read_json
from prl.train.rendezvous import keep_to, kept_store
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_SIDE = 512
_POLL_SECONDS = 0.05


def main(run_dir: RunDir, nonce: str, name: str, rank: int, size: int, seconds: float) -> None:
    for index in range(torch.cuda.device_count()):
        multiply(torch.device("cuda", index))
    print("ready", flush=True)
    if size > 1:
        address = network.address(open_run(run_dir).run)
        keep_to(address, os.environ)
        file = run_dir.path / "slurm" / f"preflight-{nonce}-{name}.json"
        add_up(run_dir, file, address, rank, size, timedelta(seconds=seconds))


def multiply(device: torch.device) -> None:
    """RuntimeError unless the device multiplies two matrices of small whole numbers without an error."""
    left = (torch.arange(_SIDE * _SIDE, device=device) % 7).float().view(_SIDE, _SIDE)
    seen = (left @ left.T).cpu()
    known = left.cpu()
    if not torch.equal(seen, known @ known.T):
        raise RuntimeError(f"device {device.index} multiplies wrongly")


def add_up(run_dir: RunDir, file: Path, address: str, rank: int, size: int, timeout: timedelta) -> None:
    """Every rank adds its number; RuntimeError, of torch's kinds too, unless all have the sum in time."""
    store = _keep(run_dir, file, address, timeout) if rank == 0 else _find(file, timeout)
    all_here(store, rank, size, timeout)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    number = torch.full((), rank + 1, device="cuda" if backend == "nccl" else "cpu")
    torch.distributed.all_reduce(number)
    if number.item() != size * (size + 1) // 2:
        raise RuntimeError(f"the sum over {size} nodes is {number.item()}, not {size * (size + 1) // 2}")
    torch.distributed.barrier()  # the store may go now
    torch.distributed.destroy_process_group()


def all_here(store: TCPStore, rank: int, size: int, timeout: timedelta) -> None:
    """RuntimeError names the ranks that are missing; NCCL would wait for them, and say nothing."""
    store.set(f"here-{rank}", "")
    deadline = time.monotonic() + timeout.total_seconds()
    while missing := [other for other in range(size) if not store.check([f"here-{other}"])]:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"of {size} nodes, those of rank {missing} did not come in {timeout.total_seconds():g} s"
            )
        time.sleep(_POLL_SECONDS)


def _keep(run_dir: RunDir, file: Path, address: str, timeout: timedelta) -> TCPStore:
    port, store = kept_store(address, timeout)
    run_dir.write_json(file, [address, port])
    return store


def _find(file: Path, timeout: timedelta) -> TCPStore:
    deadline = time.monotonic() + timeout.total_seconds()
    while (where := read_json(file)) is None:
        if time.monotonic() > deadline:
            raise RuntimeError("the first of them opened no store in time")
        time.sleep(_POLL_SECONDS)
    host, port = where
    return TCPStore(host, port, is_master=False, timeout=timeout)


if __name__ == "__main__":
    _, _run, _nonce, _name, _rank, _size, _seconds = sys.argv
    main(RunDir(_run), _nonce, _name, int(_rank), int(_size), float(_seconds))
