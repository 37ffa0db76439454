"""What a rank really holds, tensor by tensor: `python -m tests.plan.held FOLDER SHARD`, under the elastic agent."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from prl.blocks.context import Context
from prl.blocks.sharded import local
from prl.train.layout import Layout
from prl.train.logprobs import token_scores
from prl.train.parallel.ranks import Ranks
from prl_adamw import AdamWConfig
from prl_adamw.adamw import build as adamw
from prl_glm5 import Glm51Config
from prl_glm5.network import build as glm5
from prl_kimi_k2 import KimiK27Config
from prl_kimi_k2.network import build as kimi_k2
from prl_nemotron3 import UltraConfig
from prl_nemotron3.network import build as nemotron3
from prl_qwen3 import Qwen3Config
from prl_qwen3.network import build as qwen3
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

VOCABULARY, CHUNK = 96, 64
LENGTHS = (96, 64, 33, 31)
MODELS: dict[str, tuple[Any, Any]] = {
    "qwen3": (qwen3, Qwen3Config()),
    "qwen3 with experts": (qwen3, Qwen3Config(experts=8)),
    "glm-5.1": (glm5, Glm51Config()),
    "kimi-k2.7": (kimi_k2, KimiK27Config()),
    "nemotron-3-ultra": (nemotron3, UltraConfig()),
}


def build(name: str) -> nn.Module:
    function, config = MODELS[name]
    model: nn.Module = function(config, VOCABULARY)
    return model


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors if tensor is not None)


def held(ranks: Ranks, name: str, recompute: frozenset[str] = frozenset()) -> dict[str, int]:
    """Bytes after one step of one rank, and of what its forward pass kept."""
    torch.manual_seed(0)
    model = build(name)
    for layer in model.get_submodule("layers").children():
        layer.recompute = recompute
    ranks.shard(model)
    optimizer = adamw(AdamWConfig(), model.named_parameters(), 1e-3)
    kept = kept_by_a_step(model)
    gradients = nbytes(p.grad for p in model.parameters())
    optimizer.step()
    state = [value for p in model.parameters() for value in optimizer.state.get(p, {}).values()]
    return {
        "parameters": nbytes(model.parameters()),
        "gradients": gradients,
        "optimizer": nbytes(value for value in state if isinstance(value, Tensor)),
        "kept": kept,
    }


def kept_by_a_step(model: nn.Module) -> int:
    """Bytes of the storages that the forward pass saved for the backward, which then runs; parameters are not among
    them, whole or in shards."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    total = sum(LENGTHS)
    context = Context.packed(torch.tensor([0, *LENGTHS]).cumsum(0))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(total, dtype=torch.int64), context)
        of_parameters = {
            tensor.untyped_storage()._cdata
            for module in model.modules()
            for tensor in module._parameters.values()
            if tensor is not None and tensor.device.type != "meta"
        }
        rows = torch.arange(total)
        scores = token_scores(
            hidden.index_select(0, rows),
            model.head(),
            targets=torch.zeros(total, dtype=torch.int64),
            temperatures=torch.ones(total),
            chunk=CHUNK,
            entropy=True,
        )
    of_parameters.add(model.head().untyped_storage()._cdata)
    sizes = [t.untyped_storage().nbytes() for cdata, t in storages.items() if cdata not in of_parameters]
    scores.logprobs.sum().backward()
    return sum(sizes)


def main(folder: Path, shard: int) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join("cpu", Layout(shard=shard))
    found = {name: held(ranks, name) for name in MODELS}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
