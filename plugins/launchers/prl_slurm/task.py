"""`python -m prl_slurm.task FIRST:COUNT COMMAND...`: become COMMAND, with some of the devices the job has on this node.

Slurm says which they are; other jobs may have the rest of the node's. Imports nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

VISIBLE = "CUDA_VISIBLE_DEVICES"


def main(devices: str, command: list[str]) -> None:
    first, _, count = devices.partition(":")
    if refused := choose(os.environ, int(first), int(count)):
        sys.exit(refused)
    # torch, vllm and Ray refuse or misread a node that speaks of two makers' devices.
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"):
        os.environ.pop(name, None)
    os.execvp(command[0], command)


def choose(environment: MutableMapping[str, str], first: int, count: int) -> str:
    """Narrow what is visible to `count` devices from the `first` on; why that cannot be, or nothing.

    A process that asks for none keeps what it sees: under device `auto` it takes what it finds.
    """
    if not count:
        return ""
    given = [device for device in environment.get(VISIBLE, "").split(",") if device]
    if len(given) < first + count:
        node = environment.get("SLURMD_NODENAME", "this node")
        last = first + count - 1
        return f"{node}: the job has {len(given)} devices here, and this process was to have {first} to {last}"
    environment[VISIBLE] = ",".join(given[first : first + count])
    return ""


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
