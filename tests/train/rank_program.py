"""What each rank of test_parallel.py runs: `python -m tests.train.rank_program FOLDER`, under the elastic agent."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from prl import checkpoint_dir
from prl.blocks.sharded import full, local
from prl.train.checkpoint import TrainerState
from prl.train.export import Exporter, HuggingFaceExport
from prl.train.layout import Layout
from prl.train.parallel.ranks import Ranks
from prl.types import Batch, Manifest
from safetensors.torch import save_file
from torch import nn

from tests.train.tiny import (
    MODELS,
    GradientRecorder,
    SameNames,
    build_stepper,
    commit_checkpoint,
    pack_batch,
    random_samples,
)


class ToFile:
    """A weight sender that keeps what it is sent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def send(self, version, tensors):
        save_file({name: tensor.clone() for name, tensor in tensors}, self.path)
        return Manifest(version=version, location=str(self.path), tensors=())


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
    names = SameNames()
    sender = ToFile(folder / "published.safetensors") if ranks.rank == 0 else None
    model = sharded_model(ranks)
    manifest = Exporter(model=model, weight_map=names, number_format=names, sender=sender).publish(3)
    assert (manifest is not None) == (ranks.rank == 0)
    export = HuggingFaceExport(model=model, weight_map=names, writes=ranks.rank == 0)
    whole = export.collect(model.state_dict())
    assert bool(whole) == (ranks.rank == 0)
    if whole:
        export.write(whole, folder)


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


def main(folder: Path) -> None:
    ranks = Ranks.join("cpu", Layout(shard=2))
    for name in MODELS:
        record_gradients(ranks, folder, name)
    publish(ranks, folder)
    resume(ranks, folder)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
