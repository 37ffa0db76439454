"""How the trainer's ranks divide a model and its tokens: one number per axis, from `[trainer]`.

    ranks = replicate x shard x context            expert divides shard x context

    replicate   copies of the model (HSDP)         shard     ranks a copy's parameters are divided over (FSDP2)
    context     ranks that share every sequence    expert    ranks the experts of a layer are divided over

A rank's number counts the axes from the right: ranks of one context group are neighbours, so that what they exchange in
every layer stays in one machine. Imports no torch: the controller packs batches by it, and `prl config check` refuses
by it. The meshes themselves are built by `prl.train.parallel.titan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import attrs

from prl.compose.config import TrainerSection
from prl.errors import Problem

REMEDY = "pip install 'prl[titan]'"


@attrs.frozen(kw_only=True)
class Layout:
    """A layout that works."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    expert: int = 1
    divides_heads: bool = True
    """Whether ranks of `context` exchange heads where they divide them, instead of gathering keys and values."""

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def data(self) -> int:
        """Groups of ranks that are given micro-batches of their own."""
        return self.replicate * self.shard

    def place(self, rank: int) -> tuple[int, int]:
        """(which of the `data` groups, place in its context group)"""
        return divmod(rank, self.context)


def layout_of(trainer: TrainerSection) -> Layout:
    """The layout a section asks for; `problems` has nothing against it."""
    shard = trainer.shard or trainer.ranks // (trainer.replicate * trainer.context)
    return Layout(
        replicate=trainer.replicate,
        shard=shard,
        context=trainer.context,
        expert=trainer.expert,
        divides_heads=trainer.context_attention != "gather",
    )


def on_fewer_nodes(trainer: TrainerSection, nodes: int, *, least: int) -> TrainerSection | None:
    """The section laid out anew on `nodes` of its nodes, or on the most below that its mesh allows; None below `least`.

    A node's ranks, `context` and `expert` stay, which the model's own limits go by. Whole copies of the model are given
    up where that suffices, for a rank then holds what it held; else what a copy is divided over.
    """
    shard = layout_of(trainer).shard
    for left in range(nodes, max(least, 1) - 1, -1):
        ranks = trainer.ranks // trainer.nodes * left
        meshes = [(ranks // (shard * trainer.context), shard), (trainer.replicate, 0), (1, 0)]
        for replicate, divided in meshes:
            if replicate:
                found = attrs.evolve(trainer, nodes=left, ranks=ranks, replicate=replicate, shard=divided)
                if not list(problems(found)):
                    return found
    return None


def problems(trainer: TrainerSection) -> Iterator[Problem]:
    """Every reason why a section's ranks cannot be laid out as it says; a model's are in `prl.compose.limits`."""
    given = trainer.replicate * trainer.context * (trainer.shard or 1)
    axes = f"replicate {trainer.replicate} x context {trainer.context}"
    if trainer.shard:
        axes += f" x shard {trainer.shard}"
    fits = trainer.ranks == given if trainer.shard else trainer.ranks % given == 0
    if not fits:
        rule = "be" if trainer.shard else "be a multiple of"
        yield Problem("trainer.ranks", f"must {rule} {given} ({axes}), got {trainer.ranks}")
    elif (sharing := trainer.ranks // trainer.replicate) % trainer.expert:
        yield Problem(
            "trainer.expert",
            f"must divide the {sharing} ranks (shard x context) of a copy, got {trainer.expert}",
        )
    if trainer.recompute and trainer.activation_checkpointing != "selective":
        yield Problem(
            "trainer.recompute",
            f'is for activation_checkpointing = "selective", which is "{trainer.activation_checkpointing}"',
        )
    if trainer.activation_offload and trainer.activation_checkpointing == "none":
        yield Problem(
            "trainer.activation_offload",
            'moves what recomputed layers begin with: set trainer.activation_checkpointing to "full" or "selective"',
        )
    if trainer.ranks > 1 and find_spec("torchtitan") is None:
        yield Problem("trainer.ranks", f"more than one rank needs torchtitan, which is not installed: {REMEDY}")
