"""What each of two ranks of test_deepep.py runs: a mixture by all-to-all and by the plugin's dispatch, gradients beside
each other.

DeepEP has no CPU: in the place of its two operations stands what they are documented to compute, over gloo. A token
arrives once for each of this rank's experts, sorted by them; outputs are weighted and summed where the experts are.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from prl.blocks.context import Context
from prl.blocks.kernels import SEAMS
from prl.blocks.moe import Experts, MixtureOfExperts, SoftmaxRouter
from prl.train.parallel import deepep
from prl.train.parallel.experts import AllToAll
from prl_deepep.kernel import dispatch
from torch import Tensor
from torch.distributed.nn.functional import all_gather, all_reduce

HIDDEN, EXPERTS, CHOICES = 12, 6, 3


def send(x: Tensor, weights: Tensor, chosen: Tensor, group: Any, experts: int) -> tuple[Tensor, Tensor, Any]:
    tokens = torch.tensor(len(x))
    dist.all_reduce(tokens, dist.ReduceOp.MAX, group=group)
    room = int(tokens)
    everyone = [torch.cat(all_gather(_padded(t, room), group=group)) for t in (x, weights, (chosen + 1).float())]
    of_all, weighing, choices = everyone[0], everyone[1], everyone[2].long() - 1
    here = experts // dist.get_world_size(group)
    local = choices - here * dist.get_rank(group)
    token, choice = ((local >= 0) & (local < here)).nonzero(as_tuple=True)
    expert = local[token, choice]
    order = expert.argsort(stable=True)
    token, choice, expert = token[order], choice[order], expert[order]
    state = token, weighing[token, choice], of_all.shape, room, len(x), group
    return of_all[token], torch.bincount(expert, minlength=here), state


def _padded(rows: Tensor, room: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(room - len(rows), *rows.shape[1:])])


def back(outputs: Tensor, state: Any) -> Tensor:
    token, weights, shape, room, tokens, group = state
    summed = torch.zeros(shape).index_add(0, token, outputs * weights[:, None])
    first = room * dist.get_rank(group)
    return all_reduce(summed, group=group)[first : first + tokens]


def mixture(rank: int) -> MixtureOfExperts:
    """With the experts of one rank."""
    torch.manual_seed(0)
    router = SoftmaxRouter(hidden_size=HIDDEN, experts=EXPERTS, experts_per_token=CHOICES, renormalise=True)
    made = MixtureOfExperts(router, Experts(experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=8))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for parameter in made.experts.parameters():
        parameter.data = parameter.data.chunk(2)[rank].clone()
    made.run_experts = AllToAll(group=dist.group.WORLD, count=2)  # type: ignore[arg-type]
    return made


def trained(rank: int) -> list[Tensor]:
    """Outputs and gradients of this rank's own tokens: more of them on rank 1."""
    made = mixture(rank)
    tokens = (5, 9)[rank]
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    outputs = made(x, Context.packed(torch.tensor([0, tokens])), 0)
    outputs.square().sum().backward()
    return [outputs.detach(), x.grad, *(parameter.grad for parameter in made.parameters())]  # type: ignore[list-item]


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    expected = trained(rank)
    asked: list[int] = []

    def sending(*arguments: Any) -> tuple[Tensor, Tensor, Any]:
        asked.append(len(arguments[0]))
        return send(*arguments)

    deepep.send, deepep.back = sending, back
    SEAMS["dispatch"].chosen = dispatch
    found = trained(rank)
    differences = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    (folder / f"{rank}.json").write_text(json.dumps({"differences": differences, "asked": asked}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
