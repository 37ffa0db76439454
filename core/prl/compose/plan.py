"""Which processes a run consists of: what a launcher is given. Knows roles and counts, not where they run."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import attrs

from prl.compose.compose import Composition
from prl.providers import Environment
from prl.run_dir import RunDir


@attrs.frozen(kw_only=True)
class Process:
    """One process to start."""

    role: str
    """`controller`, `engine`, `environment` or `trainer` (the elastic agent, which starts its ranks itself)."""
    index: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the launcher's own environment."""
    cpus: int
    gpus: int
    """0 under device `auto`: the process takes what it finds."""

    @property
    def name(self) -> str:
        """`engine-0`: the name of its log and of its prefix in `prl logs`."""
        return f"{self.role}-{self.index}"


@attrs.frozen(kw_only=True)
class LaunchPlan:
    """Every process of a run, in the order in which they should start."""

    run_dir: RunDir
    processes: tuple[Process, ...]


def plan(composition: Composition, run_dir: RunDir) -> LaunchPlan:
    """One controller, the engines, the environment workers (none when all environments are cheap) and the trainer."""
    run = composition.run
    cuda = run.trainer.device == "cuda"
    processes = [_process(run_dir, "controller", 0)]
    processes += [_process(run_dir, "engine", index, gpus=int(cuda)) for index in range(run.engine.count)]
    workers = 0 if _all_cheap(composition) else run.rollouts.workers
    processes += [_process(run_dir, "environment", index) for index in range(workers)]
    ranks, threads = run.trainer.ranks, run.trainer.threads
    processes += [_process(run_dir, "trainer", 0, threads=threads, cpus=ranks * threads, gpus=ranks if cuda else 0)]
    return LaunchPlan(run_dir=run_dir, processes=tuple(processes))


def replay_plan(composition: Composition, run_dir: RunDir) -> LaunchPlan:
    """The trainer, and in the controller's place what re-enacts it."""
    trainer = [process for process in plan(composition, run_dir).processes if process.role == "trainer"]
    in_charge = attrs.evolve(_process(run_dir, "replay", 0), role="controller")
    return LaunchPlan(run_dir=run_dir, processes=(in_charge, *trainer))


def _all_cheap(composition: Composition) -> bool:
    """Cheap environments run inside the controller."""
    providers = (composition.provider(section) for section in composition.run.environments)
    return all(isinstance(provider, Environment) and provider.cheap for provider in providers)


def _process(run_dir: RunDir, role: str, index: int, *, threads: int = 1, cpus: int = 1, gpus: int = 0) -> Process:
    where = ("--run", str(run_dir.path), "--role", role, "--index", str(index))
    return Process(
        role=role,
        index=index,
        argv=(sys.executable, "-m", "prl", "worker", *where),
        # Some procedural generators iterate over sets: one hash seed makes a task the same task in every process.
        env={"OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0"},
        cpus=cpus,
        gpus=gpus,
    )
