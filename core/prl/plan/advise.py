"""Which layouts are worth looking at, and what would help where none works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from prl.plan.layout import combinations, neighbours, shown
from prl.plan.study import Outcome, Study, fastest
from prl.train.layout import Layout


@attrs.frozen(kw_only=True)
class Advice:
    """The layouts that were looked at."""

    configured: Outcome
    others: tuple[Outcome, ...]
    """Those that work come first, the fastest of them at the top."""
    remedy: str
    """What would make one work; empty: one does."""
    shown: Outcome
    """The configured one if it works, else the best there is, also with the remedy."""


def advise(study: Study, layout: Layout, axes: Mapping[str, Sequence[int]]) -> Advice:
    """Look at `layout` and at every combination of `axes`; without axes, at the usual degrees of each."""
    configured = study.outcome(layout)
    others = [
        study.outcome(each)
        for each in combinations(layout, study.ranks, axes or neighbours(study.experts))
        if each != layout
    ]
    best = fastest([configured, *others])
    ordered = tuple(sorted(others, key=_order))
    if best is not None:
        detailed = configured if configured.works else best
        return Advice(configured=configured, others=ordered, remedy="", shown=detailed)
    remedy, detailed = _remedy(study, [configured, *others])
    return Advice(configured=configured, others=ordered, remedy=remedy, shown=detailed)


def _order(outcome: Outcome) -> tuple[bool, bool, float]:
    if outcome.time is None or outcome.memory is None:
        return True, True, 0.0
    return not outcome.works, False, outcome.time.seconds if outcome.works else outcome.memory.peak


def _remedy(study: Study, outcomes: Sequence[Outcome]) -> tuple[str, Outcome]:
    """The least that makes a layout work: checkpoints of activations, the optimizer elsewhere, more ranks."""
    layouts = [outcome.layout for outcome in outcomes if outcome.memory]
    options = study.options
    checkpoints, offload = (
        "activation checkpointing (--checkpointing full)",
        "optimizer state in host memory (--offload)",
    )
    full = attrs.evolve(options, checkpointing="full", recompute=())
    away = "layers' inputs in host memory (--offload-activations)"
    tried = (
        (checkpoints, full),
        (offload, attrs.evolve(options, optimizer_offload=True)),
        (f"{checkpoints} and {offload}", attrs.evolve(full, optimizer_offload=True)),
        (
            f"{checkpoints}, {offload} and {away}",
            attrs.evolve(full, optimizer_offload=True, activation_offload=True),
        ),
    )
    for sentence, changed in tried:
        if changed != options:
            found = fastest([attrs.evolve(study, options=changed).outcome(layout) for layout in layouts])
            if found:
                return f"{sentence}, as {shown(found.layout)}", found
    smallest = min((o for o in outcomes if o.memory), key=lambda o: o.memory.peak if o.memory else 0)
    assert smallest.memory is not None
    return (
        f"more ranks: the smallest, {shown(smallest.layout)}, needs {smallest.memory.peak / 1e9:.0f} GB of "
        f"{study.budget / 1e9:.0f} GB on {study.ranks}",
        smallest,
    )
