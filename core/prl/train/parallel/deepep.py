"""DeepEP, through torchtitan's autograd operations for it: tokens to the ranks of their experts, and back, summed.

A token that several experts of one rank were chosen for travels once, and what they make of it is weighted and summed
before it travels back: fewer bytes than an all-to-all of every choice. Needs DeepEP 2 (`deep_ep.ElasticBuffer`), an
NVIDIA GPU of the Hopper generation or newer, and bfloat16. Called by the plugin `deepep`; no GPU has run it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from prl.errors import RunError
from prl.score.pack import round_up

_HOPPER = (9, 0)
_HOME = "torchtitan.distributed.deepep.deepep"


def missing() -> str:
    """What DeepEP needs and this process does not have; empty: nothing."""
    if find_spec("deep_ep") is None:
        return "the module deep_ep cannot be imported: install DeepEP 2 as its project describes"
    if not hasattr(import_module("deep_ep"), "ElasticBuffer"):
        return "the installed deep_ep has no ElasticBuffer: it needs version 2 or newer"
    if find_spec("torchtitan") is None:
        return "torchtitan is not installed: pip install 'prl[titan]'"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = torch.cuda.get_device_capability()
    if found < _HOPPER:
        return (
            f"{torch.cuda.get_device_name()} is of compute capability {found[0]}.{found[1]}, and 9.0 (Hopper) is needed"
        )
    return ""


def send(x: Tensor, weights: Tensor, chosen: Tensor, group: ProcessGroup, experts: int) -> tuple[Tensor, Tensor, Any]:
    """x [T, D] bfloat16, weights [T, K] float32 and chosen of all `experts` [T, K] int64 -> what this rank's experts
    were sent [N, D] sorted by expert, how many each [E] int32, and what `back` asks for."""
    if x.dtype is not torch.bfloat16:
        raise RunError(f"kernel 'deepep' sends bfloat16, and the layer computes in {x.dtype}")
    operations = import_module(_HOME)
    most = torch.tensor(len(x), device=x.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    # Few sizes: a buffer is made anew only for a larger one, which then is no layer's that waits for its backward pass.
    room = round_up(int(most))
    operations.get_buffer(group, hidden=x.shape[1], num_max_tokens_per_rank=room, num_topk=chosen.shape[1])
    arrived, counts, state = operations.dispatch_tokens(
        x, chosen, weights, experts // group.size(), experts, num_tokens_per_rank=room
    )
    return arrived, counts, state


def back(outputs: Tensor, state: Any) -> Tensor:
    """outputs [N, D] of this rank's experts -> the weighted sum of the chosen experts' outputs [T, D]."""
    operations = import_module(_HOME)
    summed: Tensor = operations.combine_tokens(outputs, state)
    operations.sync_combine()
    return summed
