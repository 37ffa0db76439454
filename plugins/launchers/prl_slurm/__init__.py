"""Plugin `slurm`: the run as a job. `launcher.py` serves whoever launches and watches it, `__main__.py` is the job."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import attrs
from prl import hookimpl, option
from prl.compose.config import LauncherConfig, Run, not_negative, positive
from prl.providers import Launcher


@attrs.frozen(kw_only=True)
class ContainerSection:
    """`[launcher.container]`: processes of the run start inside an image; the job's own process stays outside."""

    backend: Literal["none", "pyxis", "apptainer"] = option("none", help="what starts containers on this cluster")
    image: str = option("", help="file (.sqsh, .sif) or name of the image")
    mounts: tuple[str, ...] = option((), help="SOURCE:TARGET, besides the run directory and the working directory")
    options: tuple[str, ...] = option((), help="further options of srun (pyxis) or of apptainer exec")


@attrs.frozen(kw_only=True)
class NodesSection:
    """`[launcher.inference]`, `[launcher.trainer]`: what those nodes have of their own in a heterogeneous job."""

    partition: str = option("", help="instead of the job's")
    constraint: str = option("", help="instead of the job's")
    gres: str = option("", help="instead of the job's")
    memory: str = option("", help="instead of the job's")


@attrs.frozen(kw_only=True)
class SlurmConfig(LauncherConfig):
    """`[launcher] type = "slurm"`."""

    spans_hosts: ClassVar[bool] = True

    allocation: Literal["one", "shared", "heterogeneous"] = option(
        "one",
        help="one: groups have nodes of their own in one allocation; shared: groups run on the same nodes; "
        "heterogeneous: one component of a heterogeneous job per group",
    )
    spare_nodes: int = option(0, help="nodes beyond those needed, for when one is bad or lost", validator=not_negative)
    job_name: str = option("", help="by default the name of the run directory")
    partition: str = option("", help="as sbatch --partition")
    account: str = option("", help="as sbatch --account")
    qos: str = option("", help="as sbatch --qos")
    constraint: str = option("", help="as sbatch --constraint")
    exclude: str = option("", help="nodes not to use, as sbatch --exclude")
    reservation: str = option("", help="as sbatch --reservation")
    time: str = option("", help="time limit, as sbatch --time; before its end the run makes a cut and queues again")
    gres: str = option("", help="devices of a node, as sbatch --gres; by default gpu:N for the N that the plan needs")
    memory: str = option("0", help="memory of a node, as sbatch --mem; 0 is all of it")
    exclusive: bool = option(True, help="whole nodes; false: share them with other jobs")
    options: tuple[str, ...] = option((), help="further #SBATCH options, such as '--comment=...'")
    dependency: str = option("", help="as sbatch --dependency, such as 'afterok:123'")
    cut_seconds: int = option(
        300,
        help="before the time limit, when the run is told to make its cut: a step, a checkpoint and a minute",
        validator=positive,
    )
    requeues: int = option(20, help="times the job may queue again to go on by itself", validator=not_negative)
    modules: tuple[str, ...] = option((), help="loaded before every process, with `module load`")
    setup: tuple[str, ...] = option((), help="shell commands before every process, on every node")
    venv: str = option("", help="virtual environment to activate on the nodes; by default the launching Python is used")
    container: ContainerSection = option(attrs.Factory(ContainerSection), help="run processes inside an image")
    template: str = option("", help="a batch script of your own; docs/slurm.md says which names it may use")
    preflight_seconds: int = option(120, help="every node must have answered by then", validator=positive)
    collective_seconds: int = option(
        60,
        help="trainer nodes have to add up a number together within so long, once they have loaded torch",
        validator=positive,
    )
    slowest_files: float = option(
        0.0, help="a node that writes or reads the run's folder at fewer MB/s is bad", validator=not_negative
    )
    free_gb: float = option(1.0, help="gigabytes that must be free where the run's folder is", validator=not_negative)
    clock_skew: float = option(5.0, help="seconds two nodes' clocks may differ", validator=positive)
    inference: NodesSection = option(attrs.Factory(NodesSection), help="of a heterogeneous job")
    trainer: NodesSection = option(attrs.Factory(NodesSection), help="of a heterogeneous job")

    @job_name.validator
    def _one_line(self, attribute: object, value: str) -> None:
        if "\n" in value:
            raise ValueError(f"must be one line, got {value!r}")


@hookimpl
def prl_launchers() -> list[Launcher]:
    return [
        Launcher(
            name="slurm",
            config=SlurmConfig,
            summary="a job that starts the processes on its nodes, makes a cut in time and queues again",
            build="prl_slurm.launcher:build",
        )
    ]


@hookimpl
def prl_validate(run: Run) -> Iterable[str]:
    """What cannot work whatever the cluster."""
    config = run.launcher
    if not isinstance(config, SlurmConfig):
        return
    if config.spare_nodes and config.allocation == "heterogeneous":
        yield "launcher.spare_nodes: a heterogeneous job has no nodes that fit every group; use allocation = 'one'"
    if (config.container.backend == "none") != (not config.container.image):
        yield "launcher.container: needs both a backend and an image, or neither"
    if run.run.network == "loopback" and config.allocation != "shared":
        yield "run.network = 'loopback' cannot be reached from another node; leave it out, or name an interface"
