"""What each rank of test_meshes.py runs: `python -m tests.train.parallel.mesh_program FOLDER`, under the elastic agent.

One process group, many layouts of it, all families: starting processes costs more than what they compute.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import numpy as np
import torch
import torch.distributed as dist
from prl import checkpoint_dir
from prl.blocks.sharded import full, local
from prl.columns import ColumnFolder
from prl.compose.config import TrainerSection
from prl.compose.routing import Routing
from prl.routes import store
from prl.train import layers
from prl.train.checkpoint import TrainerState
from prl.train.layout import Layout
from prl.train.parallel.ranks import Ranks
from prl.train.routes import RouteReader
from prl.types import Sample
from prl_glm5 import Glm52Config
from prl_glm5.network import build as glm5
from prl_glm5.sizes import routing as glm5_routing
from prl_kimi_k2 import KimiConfig
from prl_kimi_k2.network import build as kimi_k2
from prl_kimi_k2.sizes import routing as kimi_k2_routing
from prl_nemotron3 import SuperConfig
from prl_nemotron3.network import build as nemotron3
from prl_nemotron3.sizes import routing as nemotron3_routing
from prl_qwen3.network import build as qwen3
from prl_qwen3.sizes import routing as qwen3_routing
from safetensors.torch import load_file, save_file
from torch import nn

from tests.train.tiny import (
    VOCAB,
    GradientRecorder,
    build_qwen3,
    build_stepper,
    commit_checkpoint,
    pack_batch,
    qwen3_config,
    random_samples,
    relative_difference,
)


def exact_decays(model: nn.Module) -> nn.Module:
    """With some parameters in another dtype than the rest, as a model in bfloat16 has them."""
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias", "mixer.D")):
            parameter.data = parameter.data.double()
    return model


KIMI = KimiConfig(layers=2, hidden_size=32, experts=6)  # of which four ranks hold rows
GLM = Glm52Config(layers=4, hidden_size=32, experts=4, index_top_k=4)
"""Selects 4 of up to 40 tokens; layers share the selection of earlier ones."""
NEMOTRON = SuperConfig(hidden_size=32, experts=4, pattern="ME*ME")
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    # Of which two ranks share a head of keys in the middle, and four need copies.
    "qwen3": lambda: qwen3(attrs.evolve(qwen3_config(experts=0), heads=12, kv_heads=3), VOCAB),
    "qwen3_moe": lambda: build_qwen3(experts=4),
    "kimi_k2": lambda: kimi_k2(KIMI, VOCAB),
    "glm5_2": lambda: glm5(GLM, VOCAB),
    "nemotron3": lambda: nemotron3(NEMOTRON, VOCAB),
    "nemotron3_exact": lambda: exact_decays(nemotron3(NEMOTRON, VOCAB)),
}
ROUTINGS: dict[str, Routing] = {
    "qwen3_moe": qwen3_routing(qwen3_config(experts=4)),
    "kimi_k2": kimi_k2_routing(KIMI),
    "glm5_2": glm5_routing(GLM),
    "nemotron3": nemotron3_routing(NEMOTRON),
    "nemotron3_exact": nemotron3_routing(NEMOTRON),
}
"""Of families with experts: they are also trained with the routes of an engine that chose at random."""
WAYS = {
    "none": TrainerSection(),
    "full": TrainerSection(activation_checkpointing="full"),
    "away": TrainerSection(activation_checkpointing="full", activation_offload=True),
    "selective": TrainerSection(
        activation_checkpointing="selective", recompute=("attention", "experts", "mamba"), activation_offload=True
    ),
}
MESHES: dict[int, list[tuple[Layout, str]]] = {
    2: [
        (Layout(shard=2), "none"),
        (Layout(replicate=2), "away"),
        (Layout(context=2), "selective"),
        (Layout(shard=2, expert=2), "full"),
        (Layout(context=2, expert=2, divides_heads=False), "none"),
    ],
    4: [
        (Layout(context=4, expert=2), "none"),
        (Layout(shard=2, context=2, expert=4), "away"),
        (Layout(replicate=2, shard=2, expert=2), "away"),
        (Layout(replicate=2, context=2), "none"),
    ],
}


REPLAYED = " replayed"
SAVED_ON = Layout(shard=2, expert=2)


def name(layout: Layout, way: str) -> str:
    axes = ("replicate", "shard", "context", "expert")
    divided = " ".join(f"{axis}{getattr(layout, axis)}" for axis in axes if getattr(layout, axis) > 1)
    gathers = " gather" * (layout.context > 1 and not layout.divides_heads)
    return f"{divided}{gathers} {way}"


def fits(family: str, layout: Layout, replay: bool) -> bool:
    """Whether the family has experts to divide so, and is to be tried with them.

    Two ranks replay on every mesh, four where each has a share of every sequence.
    """
    if replay and (family not in ROUTINGS or (layout.ranks == 4 and layout.context < 4)):
        return False
    experts = {"qwen3": 1, "kimi_k2": 6, "nemotron3_exact": 1}.get(family, 4)
    return experts % layout.expert == 0


def build(family: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with device:
        return FAMILIES[family]()


def recorder(model: nn.Module) -> GradientRecorder:
    return GradientRecorder([(key, p) for key, p in model.named_parameters() if p.requires_grad])


def routed(samples: Sequence[Sample], routing: Routing, folder: ColumnFolder) -> list[Sample]:
    """The samples as an engine would bring them that sends tokens anywhere; of every third token it says nothing."""
    draw = np.random.default_rng(9)
    made = []
    for index, sample in enumerate(samples):
        shape = len(sample), len(routing.layers), routing.experts
        experts = draw.random(shape).argsort(-1)[..., : routing.experts_per_token].astype(routing.dtype)
        versions = np.where(np.arange(len(sample)) % 3 == 2, -1, 5).astype(np.int32)
        columns = {"routes": experts, "route_versions": versions}
        made.append(attrs.evolve(sample, large=store(columns, folder, opening=2, group_id=index, attempt=0)))
    return made


@attrs.frozen(kw_only=True)
class Job:
    """A family and a batch: what every mesh computes as one rank does."""

    family: str
    samples: Sequence[Sample]
    routes: RouteReader | None
    """Replayed, or None."""
    device: torch.device

    @classmethod
    def of(cls, family: str, replay: bool, folder: Path, rank: int, device: torch.device) -> Job:
        samples, routes = random_samples(6, seed=3, longest=40), None
        if replay:
            columns = ColumnFolder(folder / "columns" / f"{family} {rank}")
            samples = routed(samples, ROUTINGS[family], columns)
            routes = RouteReader(folder=columns, routing=ROUTINGS[family])
        return cls(family=family, samples=samples, routes=routes, device=device)

    def step(self, layout: Layout, way: str, rank: int) -> Step:
        """One clipped step of this rank."""
        ranks = Ranks.laid_out(rank, self.device, layout)
        model = build(self.family, self.device)
        layers.apply(model, WAYS[way])
        ranks.shard(model)
        parts = recorder(model)
        batch = pack_batch(self.samples, ranks=layout.ranks, context=layout.context)
        stepper = build_stepper(
            model, parts, max_grad_norm=0.05, context=ranks.context, device=self.device, routes=self.routes
        )
        report = stepper.step(batch, batch.ranks[ranks.rank], 0.0)
        held = sum(local(p).numel() for p in model.parameters())
        return Step(gradients=parts.gradients, norm=report.values["grad_norm"], sums=dict(report.sums), held=held)


@attrs.frozen(kw_only=True)
class Step:
    """What came of it."""

    gradients: dict[str, torch.Tensor]
    """Whole ones, clipped."""
    norm: float
    sums: dict[str, float]
    held: int
    """Elements of the parameters on this rank."""


def compare(job: Job, alone: Step, layout: Layout, way: str, rank: int) -> dict[str, object]:
    """A step on this mesh beside the same step of one rank: clipped gradients, their norm, the sums of this rank."""
    seen = job.step(layout, way, rank)
    return {
        "difference": relative_difference(seen.gradients, alone.gradients),
        "grad_norm": [seen.norm, alone.norm],
        "sums": seen.sums,
        "expected": alone.sums,
        "held": seen.held,
        "parameters": alone.held,
    }


# --- checkpoints ------------------------------------------------------------------------------------------------------
def trainer_state(rank: int, layout: Layout, seed: int) -> tuple[TrainerState, Ranks]:
    ranks = Ranks.laid_out(rank, torch.device("cpu"), layout)
    model = build_qwen3(seed, experts=4)
    ranks.shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    return TrainerState(model=model, optimizer=optimizer, rank=rank, world_size=layout.ranks, seed=seed), ranks


def train(state: TrainerState, ranks: Ranks, step: int) -> None:
    batch = pack_batch(random_samples(6, seed=step), ranks=ranks.world_size, context=ranks.layout.context)
    stepper = build_stepper(state.model, state.optimizer, context=ranks.context)
    stepper.step(batch, batch.ranks[ranks.rank], 0.01)


def whole_state(state: TrainerState) -> dict[str, torch.Tensor]:
    """Everything a checkpoint must bring back, whole."""
    tensors = {name: full(tensor).clone() for name, tensor in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"{name} {key}"] = full(value).clone()
    return tensors


def save(state: TrainerState, path: Path, step: int) -> None:
    state.snapshot(step=step, version=step).write(checkpoint_dir.partial(path))
    dist.barrier()
    if state.rank == 0:
        commit_checkpoint(path, step=step)
    dist.barrier()


def write_checkpoint(folder: Path, rank: int) -> None:
    """Two steps, a checkpoint, and the step after it."""
    state, ranks = trainer_state(rank, SAVED_ON, seed=0)
    for step in range(2):
        train(state, ranks, step)
    save(state, folder / "checkpoint", 2)
    saved = whole_state(state)
    train(state, ranks, 2)
    continued = whole_state(state)
    if rank == 0:
        save_file(saved, folder / "saved.safetensors")
        save_file(continued, folder / "continued.safetensors")


def read_checkpoint(folder: Path, rank: int, layout: Layout) -> dict[str, float]:
    """Into other weights on another mesh: how far what was loaded is from what was saved, and the next step."""
    state, ranks = trainer_state(rank, layout, seed=7)
    assert state.load(folder / "checkpoint") == 2
    loaded = whole_state(state)
    save(state, folder / f"again {name(layout, 'none')}", 2)
    train(state, ranks, 2)
    return {
        "loaded": largest_difference(loaded, load_file(folder / "saved.safetensors")),
        "continued": largest_difference(whole_state(state), load_file(folder / "continued.safetensors")),
    }


def largest_difference(seen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert seen.keys() == expected.keys()
    return max((seen[key] - expected[key]).abs().max().item() for key in expected)


def compare_all(folder: Path, rank: int, device: torch.device) -> None:
    """Every family on every mesh of the world's size, without replay and with it; what each rank found goes into a
    file."""
    for family in FAMILIES:
        for replay in (False, True):
            meshes = [mesh for mesh in MESHES[dist.get_world_size()] if fits(family, mesh[0], replay)]
            if not meshes:
                continue
            job = Job.of(family, replay, folder, rank, device)
            alone = job.step(Layout(), "none", 0)
            for layout, way in meshes:
                found = compare(job, alone, layout, way, rank)
                case = f"{family} {name(layout, way)}{REPLAYED * replay}"
                (folder / f"{case} {rank}.json").write_text(json.dumps(found))
                if rank == 0:
                    print(f"{case:60} relative difference of gradients {found['difference']:.1e}")


def main(folder: Path) -> None:
    """World size 2 comes first: the others read the checkpoint it leaves."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    compare_all(folder, rank, torch.device("cpu"))
    if world_size == 2:
        write_checkpoint(folder, rank)
    for layout, _ in MESHES[world_size]:
        found = read_checkpoint(folder, rank, layout)
        (folder / f"checkpoint {name(layout, 'none')} {rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
