"""What each rank of test_parallel.py runs: `python -m tests.train.rank_program FOLDER`, under the elastic agent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from prl import checkpoint_dir
from prl.blocks.checkpoint import load
from prl.blocks.sharded import full, local
from prl.train.checkpoint import TrainerState
from prl.train.export import Exporter, HuggingFaceExport, Shares
from prl.train.layout import Layout
from prl.train.parallel.ranks import Ranks
from prl.types import Batch, Manifest
from prl_muon import MuonConfig
from prl_muon.muon import build as muon
from safetensors.torch import save_file
from torch import nn

from tests.train.tiny import (
    MODELS,
    GradientRecorder,
    SameNames,
    build_stepper,
    commit_checkpoint,
    pack_batch,
    qwen3_map,
    random_samples,
)


class ToFile:
    """A weight sender that keeps what it is sent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def send(self, version, tensors):
        save_file({name: tensor.clone() for name, tensor in tensors}, self.path)
        return Manifest.single(version=version, location=str(self.path), tensors=())


def sharded_model(ranks: Ranks, *, name: str = "tiny", seed: int = 0) -> nn.Module:
    model = MODELS[name](seed)
    ranks.shard(model)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, ranks: Ranks, batch: Batch):
    return build_stepper(model, optimizer).step(batch, batch.ranks[ranks.rank], 0.01)


def record_gradients(ranks: Ranks, folder: Path, name: str) -> None:
    """One batch of three micro-batches: one rank is given an empty one too."""
    model = sharded_model(ranks, name=name)
    recorder = GradientRecorder(model.named_parameters())
    batch = pack_batch(random_samples(3), ranks=ranks.world_size, micro_batch_tokens=8)
    report = train(model, recorder, ranks=ranks, batch=batch)
    seen = {
        "sums": dict(report.sums),
        "grad_norm": report.values["grad_norm"],
        "sizes": [len(micro.tokens) for micro in batch.ranks[ranks.rank]],
        "shard": list(local(model.get_parameter(next(iter(recorder.named)))).shape),
    }
    (folder / f"{name}-{ranks.rank}.json").write_text(json.dumps(seen))
    if ranks.rank == 0:
        save_file(recorder.gradients, folder / f"{name}-gradients.safetensors")


def publish(ranks: Ranks, folder: Path) -> None:
    """Of experts and of what is made whole, each rank sends and writes a share."""
    model = sharded_model(ranks, name="qwen3_moe")
    shares = Shares(model=model, weight_map=qwen3_map(), rank=ranks.rank, ranks=ranks.world_size)
    sender = ToFile(folder / f"published-{ranks.rank}.safetensors")
    Exporter(shares=shares, number_format=SameNames(), sender=sender).publish(3)
    export = HuggingFaceExport(shares=shares, owners=shares.owners())
    export.write(export.collect(folder), folder)
    dist.barrier()
    loaded = sharded_model(ranks, name="qwen3_moe", seed=7)
    load(loaded, qwen3_map(), folder / "huggingface")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(full(tensor), full(model.state_dict()[name])), name


def resume(ranks: Ranks, folder: Path) -> None:
    """Save in the middle of three steps, restore into other weights, repeat the last step."""
    state = trainer_state(ranks, seed=0)
    batches = [pack_batch(random_samples(6, seed=s), ranks=ranks.world_size) for s in range(3)]
    for index, batch in enumerate(batches):
        if index == 2:
            checkpoint = folder / "checkpoint"
            state.snapshot(step=2, version=2).write(checkpoint_dir.partial(checkpoint))
            dist.barrier()
            if ranks.rank == 0:
                commit_checkpoint(checkpoint, step=2)
            dist.barrier()
        train(state.model, state.optimizer, ranks=ranks, batch=batch)
    resumed = trainer_state(ranks, seed=7)
    assert resumed.load(folder / "checkpoint") == 2
    train(resumed.model, resumed.optimizer, ranks=ranks, batch=batches[2])
    for name, run in (("uninterrupted", state), ("resumed", resumed)):
        weights = {key: full(tensor).clone() for key, tensor in run.model.state_dict().items()}
        if ranks.rank == 0:
            save_file(weights, folder / f"{name}.safetensors")


def trainer_state(ranks: Ranks, seed: int) -> TrainerState:
    model = sharded_model(ranks, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return TrainerState(model=model, optimizer=optimizer, rank=ranks.rank, world_size=ranks.world_size, seed=seed)


def move_by_muon(ranks: Ranks) -> float:
    """One step of Muon on matrices that are divided by rows and by expert, beside the same step on whole ones."""
    batch = pack_batch(random_samples(6), ranks=ranks.world_size)
    moved = []
    for divided in (True, False):
        model = sharded_model(ranks, name="qwen3_moe") if divided else MODELS["qwen3_moe"](0)
        optimizer = muon(MuonConfig(), model.named_parameters(), 0.01)
        micro_batches = batch.ranks[ranks.rank] if divided else tuple(m for rank in batch.ranks for m in rank)
        build_stepper(model, optimizer).step(batch, micro_batches, 0.01)
        moved.append({name: full(p).detach() for name, p in model.named_parameters()})
    return max((moved[0][name] - moved[1][name]).abs().max().item() for name in moved[0])


def main(folder: Path) -> None:
    ranks = Ranks.join("cpu", Layout(shard=2))
    for name in MODELS:
        record_gradients(ranks, folder, name)
    publish(ranks, folder)
    experts = Ranks.laid_out(ranks.rank, ranks.device, Layout(shard=2, expert=2))
    differences = {"shard": move_by_muon(ranks), "expert": move_by_muon(experts)}
    (folder / f"muon-{ranks.rank}.json").write_text(json.dumps(differences))
    resume(ranks, folder)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
