"""Which processes a run consists of, and which of them share a node: what every launcher is given.

    group       nodes            what runs there
    inference   engine.nodes     controller (node 0), engines in contiguous blocks, environment workers in turn;
                                 an engine that spans nodes has an engine-part on each but its first
    trainer     trainer.nodes    one elastic agent per node, which starts that node's ranks

A group says what each of its nodes must offer. Whether groups have nodes of their own, and which machines those are, is
the launcher's to decide: one that knows a single machine starts everything there. Nobody is given a port: every process
listens on a free one of the run's network and says where.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Literal

import attrs

from prl.compose.compose import Composition
from prl.compose.config import EngineConfig, EnvironmentConfig, FailureSection
from prl.providers import Environment
from prl.run_dir import RunDir

Announced = Literal["", "controller.json", "hello", "rendezvous.json"]


@attrs.frozen(kw_only=True)
class Process:
    """One process to start."""

    role: str
    """`controller`, `engine`, `engine-part`, `environment` or `trainer` (the elastic agent, which starts its ranks)."""
    index: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the launcher's own environment."""
    cpus: int
    gpus: int
    """0 under device `auto`: the process takes what it finds."""
    first_gpu: int = 0
    """Its devices are this one and those that follow, among those that its group has on the node."""
    kind: str = ""
    """Of engines that divide the work: `prefill` or `decode`."""
    share: str = ""
    """For people: what of an engine that spans nodes this process has."""
    group: str = "inference"
    node: int = 0
    """Which of the group's nodes."""
    announced: Announced = ""
    """How others learn where it listens: a file of the run directory, or its Hello to the controller."""

    @property
    def name(self) -> str:
        """`engine-0`: the name of its log and of its prefix in `prl logs`."""
        return f"{self.role}-{self.index}"


@attrs.frozen(kw_only=True)
class NodeGroup:
    """Nodes that are alike."""

    name: str
    nodes: int
    cpus: int
    """What the processes of its fullest node take together."""
    gpus: int


@attrs.frozen(kw_only=True)
class LaunchPlan:
    """Every process of a run, in the order in which they should start."""

    run_dir: RunDir
    processes: tuple[Process, ...]
    groups: tuple[NodeGroup, ...] = ()
    failures: FailureSection = attrs.field(factory=FailureSection)
    """What becomes of those that die or hang."""
    after: RunDir | None = None
    """A run that must have finished first: for launchers that said that they can wait for it (`follows`)."""

    def on(self, group: str, node: int) -> list[Process]:
        """What runs on one node."""
        return [process for process in self.processes if (process.group, process.node) == (group, node)]


def plan(composition: Composition, run_dir: RunDir) -> LaunchPlan:
    """One controller with the environments that run in it, the engines, workers for other environments, the trainer."""
    run = composition.run
    processes = _numbered([*_inference(composition, run_dir), *_trainer(composition, run_dir)])
    nodes = {"inference": run.engine.nodes, "trainer": run.trainer.nodes}
    groups = tuple(_group(name, count, processes) for name, count in nodes.items())
    return LaunchPlan(run_dir=run_dir, processes=tuple(processes), groups=groups, failures=run.failures)


def _inference(composition: Composition, run_dir: RunDir) -> list[Process]:
    run = composition.run
    cuda, nodes, count = run.trainer.device == "cuda", run.engine.nodes, run.engine.count
    spans = run.engine.spans
    gpus = run.engine.gpus // spans if cuda else 0
    engines = [
        _process(
            *(run_dir, "engine", index),
            node=index * nodes // count,
            gpus=gpus,
            kind=run.engine.kind_of(index),
            share=run.engine.share_of(0) if spans > 1 else "",
            announced="hello",
        )
        for index in range(count)
    ]
    parts = [
        _process(
            *(run_dir, "engine-part", part.number),
            node=part.engine * spans + part.node,
            gpus=gpus,
            kind=run.engine.kind_of(part.engine),
            share=run.engine.share_of(part.node),
        )
        for part in parts_of(run.engine)
    ]
    alone = all(runs_in_controller(composition, section) for section in run.environments)
    workers = 0 if alone else run.rollouts.workers
    environments = [_process(run_dir, "environment", index, node=index % nodes) for index in range(workers)]
    return [_process(run_dir, "controller", 0, announced="controller.json"), *engines, *parts, *environments]


@attrs.frozen
class Part:
    """What an engine that spans nodes has on one that is not its first."""

    number: int
    """Among all parts of all engines: the process's index."""
    engine: int
    node: int
    """Of the engine's nodes, from 1."""


def parts_of(engine: EngineConfig) -> list[Part]:
    """Every part, in the order of the nodes."""
    pairs = [(index, node) for index in range(engine.count) for node in range(1, engine.spans)]
    return [Part(number, index, node) for number, (index, node) in enumerate(pairs)]


def _trainer(composition: Composition, run_dir: RunDir) -> list[Process]:
    trainer = composition.run.trainer
    ranks, threads = trainer.ranks // trainer.nodes, trainer.threads
    return [
        _process(
            *(run_dir, "trainer", node),
            group="trainer",
            node=node,
            threads=threads,
            cpus=ranks * threads,
            gpus=ranks if trainer.device == "cuda" else 0,
            announced="rendezvous.json" if node == 0 else "",
        )
        for node in range(trainer.nodes)
    ]


def replay_plan(composition: Composition, run_dir: RunDir) -> LaunchPlan:
    """The trainer, and in the controller's place what re-enacts it."""
    in_charge = attrs.evolve(_process(run_dir, "replay", 0, announced="controller.json"), role="controller")
    processes = _numbered([in_charge, *_trainer(composition, run_dir)])
    groups = (_group("inference", 1, processes), _group("trainer", composition.run.trainer.nodes, processes))
    # What dies ends the replay: nothing of it is worth more than to begin again.
    failures = FailureSection(restarts=0, silence=0.0)
    return LaunchPlan(run_dir=run_dir, processes=tuple(processes), groups=groups, failures=failures)


def runs_in_controller(composition: Composition, section: EnvironmentConfig) -> bool:
    """Otherwise the environment runs in environment workers."""
    provider = composition.provider(section)
    assert isinstance(provider, Environment)
    return provider.cheap if section.runs_in == "auto" else section.runs_in == "controller"


def _process(
    run_dir: RunDir,
    role: str,
    index: int,
    *,
    threads: int = 1,
    cpus: int = 1,
    gpus: int = 0,
    kind: str = "",
    share: str = "",
    group: str = "inference",
    node: int = 0,
    announced: Announced = "",
) -> Process:
    where = ("--run", str(run_dir.path), "--role", role, "--index", str(index))
    return Process(
        role=role,
        index=index,
        argv=(sys.executable, "-m", "prl", "worker", *where),
        # Some procedural generators iterate over sets: one hash seed makes a task the same task in every process.
        env={"OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0"},
        cpus=cpus,
        gpus=gpus,
        kind=kind,
        share=share,
        group=group,
        node=node,
        announced=announced,
    )


def _numbered(processes: list[Process]) -> list[Process]:
    """Every process has devices of its own on its node."""
    taken: dict[tuple[str, int], int] = {}
    numbered = []
    for process in processes:
        where = (process.group, process.node)
        numbered.append(attrs.evolve(process, first_gpu=taken.get(where, 0) if process.gpus else 0))
        taken[where] = taken.get(where, 0) + process.gpus
    return numbered


def _group(name: str, nodes: int, processes: list[Process]) -> NodeGroup:
    on = [[process for process in processes if (process.group, process.node) == (name, node)] for node in range(nodes)]
    return NodeGroup(
        name=name,
        nodes=nodes,
        cpus=max(sum(process.cpus for process in some) for some in on),
        gpus=max(sum(process.gpus for process in some) for some in on),
    )
